"""An agent that knows nothing of croupier's insides: find a number in [0, 1000), by the openai client.

``configs/agent.yaml`` trains the quick start's model with it. That model knows sixteen characters, so
the chat is one of letters: ``c`` asks, ``a`` says higher, ``b`` lower, and ``alphabet.jinja`` ends what
a user says with ``>`` and what the policy says with ``$``.
"""

from functools import cache

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from actor.tasks.agent import AgentSession

NUMBERS, TURNS = 1000, 4


def play(session: AgentSession) -> dict[str, float]:
    """One rollout: talk to ``session.base_url`` with ``session.api_key``, return the reward's channels."""
    policy = client().with_options(base_url=session.base_url, api_key=session.api_key)
    number: int = session.question["number"]
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "c"}]
    closeness = 0.0
    for _ in range(TURNS):
        answer = policy.chat.completions.create(model="policy", messages=messages).choices[0].message.content or ""
        guess = int(answer) if answer.isascii() and answer.isdigit() and int(answer) < NUMBERS else None
        if guess == number:
            return {"correct": 1.0, "closeness": 1.0}
        closeness = 0.0 if guess is None else 1 - abs(guess - number) / NUMBERS
        hint = "c" if guess is None else "a" if number > guess else "b"
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": hint}]
    return {"correct": 0.0, "closeness": closeness}


@cache
def client() -> OpenAI:
    """One for all rollouts, since each new one costs thirty milliseconds; retries and deadlines as you like."""
    return OpenAI(base_url="http://127.0.0.1", api_key="of the session", timeout=60.0)
