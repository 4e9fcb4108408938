"""Write the golden frames of the present wire version (only after raising WIRE_VERSION)."""

import importlib.util
from pathlib import Path

import msgpack

HERE = Path(__file__).parent


def main():
    spec = importlib.util.spec_from_file_location("test_codec", HERE.parent / "unit" / "test_codec.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    captured = {}
    original = module.encode

    def record(message):
        captured["frames"] = [bytes(f) for f in original(message)]
        return original(message)

    module.encode = record
    for name in ("trajectories", "grant", "shard"):
        path = HERE / f"wire_v{module.WIRE_VERSION}_{name}.bin"
        path.touch()
        try:
            module.test_golden_bytes(name)
        except AssertionError:
            path.write_bytes(msgpack.packb(captured["frames"]))


if __name__ == "__main__":
    main()
