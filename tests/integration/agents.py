"""Agents for the tests of the gateway."""

import asyncio
import contextlib
import json
import os
import queue
import random
import sys
import threading
import time
import urllib.error
import urllib.request

SESSIONS = queue.Queue()  # of ``seated`` agents: (session, where to put its channels)


def seated(session):
    """The test plays: it is handed the session and says what comes of it."""
    verdict = queue.Queue()
    SESSIONS.put((session, verdict))
    result = verdict.get(timeout=30)
    if isinstance(result, BaseException):
        raise result
    return result


def ask(base_url, key, messages, timeout=30, **more):
    """One request without any client library."""
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps({"model": "m", "messages": messages, **more}).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)["choices"][0]["message"]


def two_turns(session):
    """A short talk, now and then with an edited history; its worth is the length of what was said."""
    messages = [{"role": "user", "content": session.question["text"]}]
    messages.append(ask(session.base_url, session.api_key, messages))
    if session.question["n"] % 3 == 0:
        messages[1] = {"role": "assistant", "content": "something else"}
    messages.append({"role": "user", "content": "more"})
    answer = ask(session.base_url, session.api_key, messages, max_tokens=4)
    return {"correct": float(len(answer["content"] or "") % 2)}


def openai_turns(session):
    """The same by the openai client, for a configuration that knows a second channel."""
    import openai  # where it is needed: commands start without it

    messages = [{"role": "user", "content": session.question["text"]}]
    with openai.OpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        messages.append(client.chat.completions.create(model="m", messages=messages).choices[0].message)
        if session.question["n"] % 3 == 0:
            messages[1] = {"role": "assistant", "content": "something else"}
        messages.append({"role": "user", "content": "more"})
        answer = client.chat.completions.create(model="m", messages=messages).choices[0].message.content or ""
    return {"correct": float(len(answer) % 2), "prefix": len(answer) / 100}


def wild(session):
    """Whatever agents do: talk on, branch, edit, hurry, talk at once, give up, break, hang for a while."""
    dice = random.Random(session.api_key.split("-")[1] + os.environ.get("WILD", ""))
    messages = [{"role": "user", "content": "hello"}]

    def turn(timeout=10):
        return ask(session.base_url, session.api_key, messages, timeout, max_tokens=dice.randint(1, 8))

    def hasty_turn(timeout=10):
        with contextlib.suppress(OSError):  # refused, or given up
            turn(timeout)

    for _ in range(dice.randint(0, 5)):
        match dice.randrange(8):
            case 0:
                messages = messages[: dice.randint(1, len(messages))]
            case 1:
                hasty_turn(timeout=0.005)
            case 2:
                others = [threading.Thread(target=hasty_turn) for _ in range(2)]
                for thread in others:
                    thread.start()
                for thread in others[: dice.randint(0, 2)]:
                    thread.join()
            case 3 if dice.random() < 0.3:
                raise RuntimeError("the environment broke")
            case 4 if dice.random() < 0.2:
                time.sleep(1.2)
            case _:
                try:
                    messages = [*messages, turn(), {"role": "user", "content": f"more {dice.random()}"}]
                except urllib.error.HTTPError as error:
                    if error.code != 400:  # no turns or room left: a good end
                        raise
                    break
    return {"correct": dice.random()}


async def sleeper(session):
    """Never ends by itself."""
    await asyncio.sleep(60)


def stubborn(session):
    """Never ends by itself, and cannot be stopped."""
    time.sleep(1.2)
    return {"correct": 0.0}


class Session:
    """Of a command, from its environment."""

    base_url, api_key = os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY")
    question = json.loads(os.environ.get("CROUPIER_QUESTION", "{}"))


if __name__ == "__main__":
    if sys.argv[1] == "fail":
        sys.exit("the environment broke")
    elif sys.argv[1] == "chatter":
        print("no channels here")
    else:
        print("one line\n" + json.dumps(two_turns(Session)))
