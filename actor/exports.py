"""An actor's counters as Prometheus' metrics. Pure."""

from collections.abc import Mapping

from common.exporter import Families, counter, gauge

SECONDS, OF_MODEL = "seconds_", "_seconds"
REWARD, DOWN = "reward_", "_down"


def counter_families(counters: Mapping[str, float]) -> Families:
    """As heartbeats carry them: an engine's, scoring's and the actor's own."""
    known = dict(counters)
    yield counter("croupier_actor_tokens_total", "Tokens sampled.", known.pop("tokens", 0.0))
    timed = [name for name in known if name.startswith(SECONDS) or name.endswith(OF_MODEL)]
    seconds = {name.removeprefix(SECONDS).removesuffix(OF_MODEL): known.pop(name) for name in timed}
    yield counter("croupier_actor_seconds_total", "Wall-clock spent, by what.", what=seconds)
    yield gauge("croupier_actor_servers", "SGLang servers.", known.pop("servers", None))
    yield gauge("croupier_actor_servers_serving", "Of those, serving.", known.pop("servers_serving", None))
    yield gauge("croupier_actor_scoring", "Rollouts sampled and being scored.", known.pop("scoring", None))
    down = {
        name.removeprefix(REWARD).removesuffix(DOWN): known.pop(name) for name in list(known) if name.endswith(DOWN)
    }
    yield gauge("croupier_actor_reward_model_down", "1 while a reward model is left alone.", model=down)
    yield gauge("croupier_actor_concurrency", "Requests allowed at once.", known.pop("concurrency", None))
    yield counter("croupier_actor_events_total", "What else was counted: rollouts, failures, retries.", event=known)
