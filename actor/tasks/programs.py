"""Correct functions to be broken and repaired, each with a maker of arguments. Pure data.

Arguments and results are what JSON has. ``$k`` stands for a small number drawn with the question.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from actor.tasks.arguments import Arguments, intervals, matrix, nested, numbers, search, word

CONSTANTS = range(2, 8)  # what ``$k`` may be


@dataclass(frozen=True)
class Program:
    """One function: its source, what it is to do, and arguments to call it with."""

    name: str
    says: str  # what a caller may expect; $k as in the source
    source: str
    arguments: Callable[[Random], Arguments]


PROGRAMS: list[Program] = []


def _add(says: str, source: str, arguments: Callable[[Random], Arguments]) -> None:
    text = textwrap.dedent(source).strip() + "\n"
    PROGRAMS.append(Program(text.split("(")[0].removeprefix("def "), says, text, arguments))


_add(
    "counts the numbers that are greater than limit and divisible by $k",
    """
    def count_multiples(numbers, limit):
        count = 0
        for number in numbers:
            if number > limit and number % $k == 0:
                count += 1
        return count
    """,
    lambda rng: [numbers(rng), rng.randint(-3, 8)],
)
_add(
    "returns for each place the largest of the numbers up to there",
    """
    def running_max(numbers):
        result = []
        for number in numbers:
            if result and result[-1] > number:
                result.append(result[-1])
            else:
                result.append(number)
        return result
    """,
    lambda rng: [numbers(rng)],
)
_add(
    "returns the index of wanted in the sorted list items, or -1 if it is not there",
    """
    def find_sorted(items, wanted):
        low = 0
        high = len(items) - 1
        while low <= high:
            middle = (low + high) // 2
            if items[middle] == wanted:
                return middle
            if items[middle] < wanted:
                low = middle + 1
            else:
                high = middle - 1
        return -1
    """,
    search,
)
_add(
    "returns the greatest common divisor of a and b",
    """
    def common_divisor(a, b):
        while b != 0:
            a, b = b, a % b
        return a
    """,
    lambda rng: [rng.randint(1, 12) * rng.randint(1, 9), rng.randint(1, 12) * rng.randint(0, 9)],
)
_add(
    "tells whether text reads the same backwards; case does not count",
    """
    def is_palindrome(text):
        text = text.lower()
        for i in range(len(text) // 2):
            if text[i] != text[len(text) - 1 - i]:
                return False
        return True
    """,
    lambda rng: [(half := word(rng, 0, 4, "abAB")) + word(rng, 0, 2, "ab") + half[::-1]],
)
_add(
    "returns the runs of equal characters as pairs [character, length]",
    """
    def run_lengths(text):
        runs = []
        for character in text:
            if runs and runs[-1][0] == character:
                runs[-1][1] += 1
            else:
                runs.append([character, 1])
        return runs
    """,
    lambda rng: [word(rng, 0, 12, "ab")],
)
_add(
    "merges two sorted lists into one",
    """
    def merge_sorted(first, second):
        merged = []
        i = 0
        j = 0
        while i < len(first) and j < len(second):
            if first[i] <= second[j]:
                merged.append(first[i])
                i += 1
            else:
                merged.append(second[j])
                j += 1
        return merged + first[i:] + second[j:]
    """,
    lambda rng: [sorted(numbers(rng, 0, 5)), sorted(numbers(rng, 0, 5))],
)
_add(
    "moves each lower-case letter $k places on in the alphabet, from z back to a; leaves other characters alone",
    """
    def shift_letters(text):
        result = ""
        for character in text:
            if "a" <= character <= "z":
                place = (ord(character) - ord("a") + $k) % 26
                result += chr(place + ord("a"))
            else:
                result += character
        return result
    """,
    lambda rng: [word(rng, 1, 8, "abmxyz A!")],
)
_add(
    "returns how deep lists are nested: 1 for a list without a list in it",
    """
    def depth(nested):
        deepest = 0
        for item in nested:
            if isinstance(item, list):
                deepest = max(deepest, depth(item))
        return deepest + 1
    """,
    lambda rng: [nested(rng)],
)
_add(
    "returns the first n numbers of the sequence that begins with 1 and $k and goes on with the sum of the last two",
    """
    def sums_of_two(n):
        numbers = []
        a = 1
        b = $k
        for _ in range(n):
            numbers.append(a)
            a, b = b, a + b
        return numbers
    """,
    lambda rng: [rng.randint(0, 9)],
)
_add(
    "returns all prime numbers below n",
    """
    def primes_below(n):
        primes = []
        for number in range(2, n):
            prime = True
            for divisor in primes:
                if number % divisor == 0:
                    prime = False
                    break
            if prime:
                primes.append(number)
        return primes
    """,
    lambda rng: [rng.randint(0, 40)],
)
_add(
    "turns rows into columns",
    """
    def transpose(matrix):
        columns = []
        for j in range(len(matrix[0])):
            column = []
            for i in range(len(matrix)):
                column.append(matrix[i][j])
            columns.append(column)
        return columns
    """,
    lambda rng: [matrix(rng)],
)
_add(
    "sorts numbers, the smallest first",
    """
    def insertion_sort(numbers):
        result = list(numbers)
        for i in range(1, len(result)):
            value = result[i]
            j = i - 1
            while j >= 0 and result[j] > value:
                result[j + 1] = result[j]
                j -= 1
            result[j + 1] = value
        return result
    """,
    lambda rng: [numbers(rng)],
)
_add(
    "tells whether the brackets ( ) [ ] in text are closed in the right order",
    """
    def balanced(text):
        pairs = {")": "(", "]": "["}
        waiting = []
        for character in text:
            if character in "([":
                waiting.append(character)
            elif character in pairs:
                if not waiting or waiting.pop() != pairs[character]:
                    return False
        return len(waiting) == 0
    """,
    lambda rng: [rng.choice(["", "()", "[()]", "([])x", "(]", "(", "a)", "[](())", word(rng, 1, 5, "()[]")])],
)
_add(
    "counts how often each word of at least $k letters occurs in text",
    """
    def word_counts(text):
        counts = {}
        for word in text.split():
            if len(word) >= $k:
                counts[word] = counts.get(word, 0) + 1
        return counts
    """,
    lambda rng: [" ".join(word(rng, 1, 8, "a") for _ in range(rng.randint(0, 8)))],
)
_add(
    "returns the sum of the digits of n",
    """
    def digit_sum(n):
        total = 0
        while n > 0:
            total += n % 10
            n //= 10
        return total
    """,
    lambda rng: [rng.randint(0, 99999)],
)
_add(
    "returns how many steps take n to 1, where an even number is halved, an odd one tripled and increased by 1",
    """
    def steps_to_one(n):
        steps = 0
        while n != 1:
            if n % 2 == 0:
                n = n // 2
            else:
                n = 3 * n + 1
            steps += 1
        return steps
    """,
    lambda rng: [rng.randint(1, 30)],
)
_add(
    "returns the length of the longest stretch in which each number is greater than the one before it",
    """
    def longest_rise(numbers):
        longest = 0
        current = 0
        for i in range(len(numbers)):
            if i > 0 and numbers[i] > numbers[i - 1]:
                current += 1
            else:
                current = 1
            longest = max(longest, current)
        return longest
    """,
    lambda rng: [numbers(rng)],
)
_add(
    "writes n in Roman numerals",
    """
    def roman(n):
        values = [100, 90, 50, 40, 10, 9, 5, 4, 1]
        letters = ["C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"]
        text = ""
        for value, letter in zip(values, letters):
            while n >= value:
                text += letter
                n -= value
        return text
    """,
    lambda rng: [rng.randint(1, 199)],
)
_add(
    "returns the sums of every $k neighbouring numbers",
    """
    def window_sums(numbers):
        sums = []
        for start in range(len(numbers) - $k + 1):
            total = 0
            for number in numbers[start : start + $k]:
                total += number
            sums.append(total)
        return sums
    """,
    lambda rng: [numbers(rng, 0, 12)],
)
_add(
    "returns how many characters must be inserted, deleted or replaced to turn a into b",
    """
    def edit_distance(a, b):
        before = list(range(len(b) + 1))
        for i in range(len(a)):
            current = [i + 1]
            for j in range(len(b)):
                same = 0 if a[i] == b[j] else 1
                current.append(min(before[j] + same, before[j + 1] + 1, current[j] + 1))
            before = current
        return before[len(b)]
    """,
    lambda rng: [word(rng, 0, 6, "abc"), word(rng, 0, 6, "abc")],
)
_add(
    "returns the largest number but one, or None if there is none; equal numbers count once",
    """
    def second_largest(numbers):
        first = None
        second = None
        for number in numbers:
            if first is None or number > first:
                first, second = number, first
            elif number != first and (second is None or number > second):
                second = number
        return second
    """,
    lambda rng: [numbers(rng, 0, 6, 6)],
)
_add(
    "returns the row n of Pascal's triangle; row 0 is [1]",
    """
    def pascal_row(n):
        row = [1]
        for _ in range(n):
            longer = [1]
            for i in range(len(row) - 1):
                longer.append(row[i] + row[i + 1])
            longer.append(1)
            row = longer
        return row
    """,
    lambda rng: [rng.randint(0, 7)],
)
_add(
    "cuts items into lists of $k; the last one may be shorter",
    """
    def in_parts(items):
        parts = []
        part = []
        for item in items:
            part.append(item)
            if len(part) == $k:
                parts.append(part)
                part = []
        if part:
            parts.append(part)
        return parts
    """,
    lambda rng: [numbers(rng, 0, 14)],
)
_add(
    "writes n in the number system of the base",
    """
    def in_base(n, base):
        if n == 0:
            return "0"
        digits = ""
        while n > 0:
            digits = "0123456789abcdef"[n % base] + digits
            n = n // base
        return digits
    """,
    lambda rng: [rng.choice([0, rng.randint(1, 400)]), rng.randint(2, 16)],
)
_add(
    "merges intervals [start, end] that overlap or touch; returns them by their starts",
    """
    def merge_intervals(intervals):
        merged = []
        for start, end in sorted(intervals):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        return merged
    """,
    lambda rng: [intervals(rng)],
)
_add(
    "moves the items $k places to the left; those in front come to the end",
    """
    def rotate(items):
        if not items:
            return []
        places = $k % len(items)
        return items[places:] + items[:places]
    """,
    lambda rng: [numbers(rng, 0, 9)],
)
_add(
    "returns the numbers that are in both lists, in the order of the first, each once",
    """
    def in_both(first, second):
        found = []
        for number in first:
            if number in second and number not in found:
                found.append(number)
        return found
    """,
    lambda rng: [numbers(rng, 0, 8, 6), numbers(rng, 0, 8, 6)],
)
