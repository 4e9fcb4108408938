"""What a peer's model directory must be: the policy's, or the frozen model's that it serves."""

from common.config import RunConfig
from common.frozen import POLICY, command_of
from common.identity import TOKENS, differing_identity, model_identity, other_tokens
from common.wire import Hello


class Identities:
    """Of the directories that the broker can read; what it cannot is compared with nothing."""

    def __init__(self, config: RunConfig) -> None:
        self.policy = model_identity(config.model.path)
        self.rollout = model_identity(config.joint.path) if config.joint.path else {}  # of the actors
        self._models = config.frozen
        self._frozen = {name: model_identity(model.path) for name, model in config.frozen.items()}

    def objection(self, hello: Hello) -> str:
        """Why a peer may not take part, in words; "" if nothing speaks against it."""
        if hello.serves == POLICY:
            ours, key = self.policy, "model.path"
            if hello.role == "actor" and self.rollout:
                ours, key = self.rollout, "joint.path"
            differs = differing_identity(ours, hello.model)
            remedy = "give it the directory that the broker has"
            return f"its {key} holds another model: {differs}; {remedy}" if differs else ""
        model = self._models.get(hello.serves)
        if hello.role != "replica" or model is None:
            known = ", ".join(self._models) or "no frozen model: they come with loss.kl and loss.distill"
            return f"it serves {hello.serves!r}, and this run has {known}; start it as `{command_of('NAME')}`"
        if differs := differing_identity(self._frozen[hello.serves], hello.model):
            return f"its {model.key} holds another model: {differs}; give it the directory that the broker has"
        if differs := differing_identity(self.policy, hello.model, TOKENS):
            return other_tokens(model.words, model.key, differs)
        return ""
