"""Writing checkpoints (:mod:`learner.checkpoint`) beside the training: a copy in memory, and a thread for the disk."""

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.durable import make_directory, sync
from common.errors import CheckpointError, DeadlineError
from learner.checkpoint import BESIDE, POLL_S, Trained, TrainingState, digest_of, file_of, shares
from learner.layout import places, views
from learner.mesh import Mesh
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.retention import PREFIX, STATE, Retention, path_of

RUN = "run.json"  # the broker's, beside the checkpoints


class CheckpointWriter:
    """Writes one checkpoint at a time, beside the training."""

    def __init__(self, directory: Path, mesh: Mesh, retention: Retention, timeout_s: float) -> None:
        """Collective: all ranks agree on a name for what is not finished."""
        self.directory, self.mesh, self.retention, self.timeout_s = directory, mesh, retention, timeout_s
        self._nonce = f"{mesh.broadcast_int(secrets.randbits(31)):08x}"
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._writing = -1
        self._written = 0.0  # when this rank's file was; 0: not yet
        self._given_up = False
        self._finished: list[int] = []
        if mesh.rank == 0:
            for stale in directory.glob(f".{PREFIX}*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
        mesh.barrier()

    def start(self, model: Decoder, optimizer: Optimizer, state: TrainingState, beside: Trained | None = None) -> None:
        """Copy this rank's shard and write it in the background. Waits for the checkpoint before, if need be."""
        self.wait()
        pieces = {key: _copied(tensor) for key, tensor in _pieces(model, optimizer)}
        if beside is not None:
            pieces |= {BESIDE + key: _copied(tensor) for key, tensor in _pieces(*beside)}
        pieces[f"rng|{self.mesh.rank}"] = torch.get_rng_state()
        self._writing, self._written = state.step, 0.0
        self._thread = threading.Thread(target=self._run, args=(pieces, state), name="checkpoint", daemon=True)
        self._thread.start()

    def finished(self) -> list[int]:
        """Steps whose checkpoints were completed since the last call; raises what went wrong."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        done, self._finished = self._finished, []
        return done

    def wait(self) -> None:
        """Until nothing is being written; :class:`CheckpointError` or :class:`DeadlineError` if it failed."""
        if self._thread is None:
            return
        asked = time.monotonic()
        while self._thread.is_alive():
            left = max(asked, self._written) + self.timeout_s + 1.0 - time.monotonic()  # the thread's own comes first
            if left <= 0:
                self._given_up = True
                what = "complete it" if self._written else "write its file"
                raise DeadlineError(
                    f"checkpoint of step {self._writing}: rank {self.mesh.rank} did not {what} within "
                    f"{self.timeout_s:.0f} s (learner.write_timeout_s); is the disk slow?"
                )
            self._thread.join(min(left, 1.0))
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self._finished.append(self._writing)

    def _run(self, pieces: dict[str, Tensor], state: TrainingState) -> None:
        final = path_of(self.directory, state.step)
        temporary = self.directory / f".{final.name}.{self._nonce}.tmp"
        try:
            make_directory(self.directory)
            temporary.mkdir(exist_ok=True)
            file = temporary / file_of(self.mesh.rank)
            save_file(pieces, file.with_suffix(".part"), {key: digest_of(tensor) for key, tensor in pieces.items()})
            sync(file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
            self._written = time.monotonic()
            if self.mesh.rank == 0:
                self._complete(temporary, final, state)
        except (DeadlineError, CheckpointError) as error:
            self._error = error
        except Exception as error:  # noqa: BLE001  # whatever it was, this checkpoint must not count as written
            self._error = CheckpointError(
                f"{final}: rank {self.mesh.rank} cannot write it ({error}); is the disk full? "
                "The checkpoint before is untouched"
            )
            with contextlib.suppress(OSError):  # half a file would keep the disk full
                (temporary / file_of(self.mesh.rank)).with_suffix(".part").unlink(missing_ok=True)

    def _complete(self, temporary: Path, final: Path, state: TrainingState) -> None:
        self._check_run(state.run_id)
        deadline = time.monotonic() + self.timeout_s
        while missing := [r for r in range(self.mesh.world) if not (temporary / file_of(r)).is_file()]:
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{final}: ranks {missing} wrote nothing within {self.timeout_s:.0f} s (learner.write_timeout_s); "
                    "all ranks need the same run directory"
                )
            time.sleep(POLL_S)
        (temporary / STATE).write_text(json.dumps({**asdict(state), "ranks": self.mesh.world}) + "\n")
        sync(temporary / STATE)
        sync(temporary)
        if self._given_up:  # and the learner ended by that
            return
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(self.directory)
        self.retention.prune()

    def _check_run(self, run_id: str) -> None:
        """The directory may be another run's by now: one whose launcher was killed is set aside at the next start."""
        try:
            found = str(json.loads((self.directory.parent / RUN).read_text())["run_id"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # the broker's files lie elsewhere
        if run_id and found != run_id:
            raise CheckpointError(
                f"{self.directory}: is run {found}'s by now, this learner's is {run_id}; nothing was written"
            )


def _copied(tensor: Tensor) -> Tensor:
    """On the host, in memory of its own."""
    return tensor.detach().to("cpu", copy=True)


def _pieces(model: Decoder, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    known = {place.name: place for place in places(model.config)}
    tp = model.mesh.tp
    for flat in optimizer.flats:
        if not flat.sharing.counts:
            continue
        own = {"weight": flat.master.data, **optimizer.moments(flat)}
        for name, view, offset in shares(model, flat):
            begin, end = max(offset, flat.range.start), min(offset + view.numel(), flat.range.stop)
            if begin >= end:
                continue
            part = f"{tp.rank}/{tp.size}" if known[name].dim is not None else "0/1"
            for kind, tensor in own.items():
                yield (
                    f"{kind}|{name}|{part}|{begin - offset}",
                    tensor[begin - flat.range.start : end - flat.range.start],
                )
    for name, view in views(model).items():
        if known[name].optional and known[name].owners(model.config, model.mesh) == [model.mesh.rank]:
            yield f"weight|{name}|0/1|0", view
