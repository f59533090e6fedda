"""Recovery of results and artefacts: what is exported is what was trained, and the old artefact stays until it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import grainwise as gw
from grainwise import session as session_module
from grainwise.artefacts import checkpoint_folder, recover_artefact, verify_artefact
from grainwise.cli import app
from grainwise.evaluate.data import DataError
from grainwise.export.artefact import ArtefactError
from grainwise.export.manifest import read_manifest, read_sealed
from grainwise.export.parity import ParityError
from grainwise.recover.checkpoint import Checkpoint
from grainwise.recover.errors import RecoveryError
from grainwise.recover.options import RecoverOptions
from tests.networks import tiny, tiny_data, tiny_training
from tests.recover.candidates import MIXED

ROOT = Path(__file__).parents[2]
QUICK = RecoverOptions(learning_rate=0.01, warm_up=4)
NETWORK = ["--model", "tests.networks:tiny", "--data", "tests.networks:tiny_data"]
TRAIN = [*NETWORK, "--train", "tests.recover.test_artefact:training", "--learning-rate", "0.01", "--threads", "1"]


class Stopping:
    """The training data of `tiny`; where the environment says so, its process gets SIGTERM at that batch."""

    def __init__(self) -> None:
        self.left = int(os.environ.get("GRAINWISE_TEST_STOP", "0"))

    def __len__(self) -> int:
        return len(tiny_training())

    def __iter__(self) -> Iterator[Tensor]:
        for chosen in torch.randperm(len(self)).tolist():
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield tiny_training()[chosen][0]


training = Stopping


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact without a file; tests copy it."""
    session = gw.Session.prepare(tiny(), tiny_data(), target="packed")
    return session.finish(MIXED, 7).export(tmp_path_factory.mktemp("packed") / "out")


@pytest.fixture
def artefact(packed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    (tmp_path / "out").mkdir()
    for file in packed.iterdir():
        (tmp_path / "out" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "out"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def recovered(directory: Path, **changes: object) -> gw.Result:
    settings: dict[str, object] = {"train": Stopping(), "epochs": 3, "options": QUICK, **changes}
    return recover_artefact(directory, tiny(), tiny_data(), **settings)  # type: ignore[arg-type]


def test_a_file_is_recovered_and_passes_the_gate(onnx_session: gw.Session, tmp_path: Path) -> None:
    """From the result of a search, and from its artefact: the same network, equal bytes and kernels."""
    result = onnx_session.finish(MIXED, 7)
    directory = result.export(tmp_path / "out")
    found = result.recover(Stopping(), epochs=3, options=QUICK)
    assert found.measurement.divergence < 0.9 * result.measurement.divergence
    assert found.measurement.size_bytes == result.measurement.size_bytes
    assert found.deployed["kernels"] == result.deployed["kernels"]
    again = recovered(directory)
    assert again.recovery is not None and found.recovery is not None
    assert again.recovery.losses == pytest.approx(found.recovery.losses, abs=1e-6)
    figures = verify_artefact(directory, tiny(), tiny_data())
    assert figures["accuracy"] == again.test_metric and figures["top1_agreement"] == 1.0
    assert figures["size_bytes"] == result.measurement.size_bytes and figures["trials"] == 7
    claimed = read_manifest(directory).figures
    assert claimed["unrecovered_divergence"] == result.measurement.divergence
    assert claimed["divergence"] == again.measurement.divergence and claimed["recovery_epochs"] == 3
    x = next(iter(tiny_data().test))[0]
    torch.testing.assert_close(gw.load(directory, tiny()).model(x), again.model(x), rtol=0, atol=1e-5)
    assert torch.from_numpy(gw.load(directory)(x)).sub(again.model(x)).abs().max() < 1e-3
    assert "Fine-tuned afterwards by distillation" in (directory / "README.md").read_text()
    assert not checkpoint_folder(directory).exists()


def test_the_old_artefact_stays_where_the_gate_refuses(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(artefact)

    def refuse(*given: object) -> None:
        raise ParityError("the file computes layer stem otherwise")

    monkeypatch.setattr(session_module.Session, "_deployed", refuse)
    with pytest.raises(ParityError, match="layer stem"):
        recovered(artefact)
    assert contents(artefact) == before
    assert Checkpoint.load(checkpoint_folder(artefact)).facts["progress"]["epoch"] == 3
    monkeypatch.undo()
    recovered(artefact, resume=True)  # nothing is trained again
    assert contents(artefact) != before and read_sealed(artefact)


def test_a_file_that_was_damaged_while_it_was_written_is_not_published(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grainwise.export import artefact as module

    before = contents(artefact)

    def damage(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")

    monkeypatch.setattr(module, "_sync", damage)
    with pytest.raises(ArtefactError, match="not the file that the manifest describes"):
        recovered(artefact)
    assert contents(artefact) == before


def test_where_nothing_is_better_the_artefact_stays(artefact: Path) -> None:
    before = contents(artefact)
    found = recovered(artefact, options=RecoverOptions(learning_rate=2.0, warm_up=0), epochs=1)
    assert found.recovery is not None and found.recovery.best == 0
    assert contents(artefact) == before and not checkpoint_folder(artefact).exists()


def test_a_foreign_artefact_is_refused(artefact: Path) -> None:
    with pytest.raises(ArtefactError, match="was made from other weights than this network has; give the one"):
        recover_artefact(artefact, tiny(seed=1), tiny_data(), Stopping(), epochs=1)


def test_training_data_of_another_split_are_refused(artefact: Path) -> None:
    before = contents(artefact)
    with pytest.raises(DataError, match="training split is in the search split too"):
        recovered(artefact, train=list(tiny_data().search))
    assert contents(artefact) == before


def test_a_terminated_command_goes_on_to_the_same_losses(artefact: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "uncut"
    wanted.mkdir()
    for name, content in contents(artefact).items():
        (wanted / name).write_bytes(content)
    options = RecoverOptions(learning_rate=0.01)  # as the command has them
    uncut = recovered(wanted, options=options)
    before = contents(artefact)
    command = ["recover", str(artefact), *TRAIN, "--epochs", "3"]
    process = subprocess.run(
        [sys.executable, "-c", "from grainwise.cli import main; main()", *command],
        cwd=ROOT,
        env={**os.environ, "GRAINWISE_TEST_STOP": "6", "COLUMNS": "500"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 130, process.stderr
    assert "the artefact is unchanged and a checkpoint is kept beside it. Go on with:" in process.stderr
    assert f"grainwise {' '.join(command)} --resume" in process.stderr
    assert contents(artefact) == before
    assert Checkpoint.load(checkpoint_folder(artefact)).facts["progress"]["step"] == 6
    with pytest.raises(RecoveryError, match="has a checkpoint of a recovery that was cut"):
        recovered(artefact)
    found = recovered(artefact, options=options, resume=True)
    assert found.recovery is not None and uncut.recovery is not None
    assert found.recovery.losses == pytest.approx(uncut.recovery.losses, abs=1e-6)
    assert contents(artefact)["model.safetensors"] == contents(wanted)["model.safetensors"]


def test_the_command_recovers(artefact: Path) -> None:
    found = CliRunner().invoke(app, ["recover", str(artefact), *TRAIN, "--epochs", "2", "--json"])
    assert found.exit_code == 0, found.output
    figures = json.loads(found.stdout)
    assert figures["recovery_epochs"] == 2 and figures["divergence"] < figures["unrecovered_divergence"]
    assert verify_artefact(artefact, tiny(), tiny_data())["accuracy"] == figures["accuracy"]
    again = CliRunner().invoke(app, ["recover", str(artefact), *TRAIN, "--minutes", "0.001", "--learning-rate", "9"])
    assert again.exit_code == 0 and f"nothing better was found; {artefact} is unchanged" in again.output
    both = CliRunner().invoke(app, ["recover", str(artefact), *TRAIN, "--minutes", "1", "--epochs", "1"])
    assert both.exit_code == 1 and "error: give epochs or minutes" in both.output
