"""A model's tensors by the names of its files."""

from learner.layout import places, views


def hf_tensors(model):
    """(Hugging Face name, view of our parameter) of what this rank holds, in the order of the files."""
    held = views(model)
    for place in places(model.config):
        if place.name in held:
            yield place.name, held[place.name]
