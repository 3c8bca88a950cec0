"""Several processes: what they tell each other, sums in one order, and the same model at any number of them."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from perceiver_cli.config import ModelConfig, tiny_config
from perceiver_cli.data.decoder import Decoded
from perceiver_cli.data.examples import Example
from perceiver_cli.errors import DataError, LostError, PerceiverError, UsageError
from perceiver_cli.hardware import LAUNCHED, Place
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.model.ranks import ALONE, Ranks, joined
from perceiver_cli.model.slices import slice_logits
from perceiver_cli.model.stems import ConvStem
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.run_folder import MODEL_FILE
from perceiver_cli.training.cache import preload_shared
from perceiver_cli.training.events import StepDone
from perceiver_cli.training.plan import shared_out
from perceiver_cli.training.state import load_state
from perceiver_cli.training.sums import BatchStatistics, Node, TreeSum, flat_total, tree_total
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, SMALL_PAIRS, write_images

# What changes a sum: the optimiser's norms, mixing, weights of classes, the average, the norm of the gradient.
RECIPE = (
    *SMALL, "train.batch_size=4", "train.accumulate=4", "train.steps=4", "train.save_every=2 steps",
    "train.eval_every=4 steps", "train.optimizer=lamb", "train.mixup=0.2", "train.cutmix=1.0", "train.ema_decay=0.9",
    "train.clip_norm=1.0", "train.label_smoothing=0.1", "data.class_weight_power=0.5",
)  # fmt: skip


def as_ranks(count: int, folder: Path, work: Callable[[Ranks], Any]) -> list[Any]:
    """Return what `work` returns, as JSON, or the words of its error, in each of `count` forked processes."""
    folder.mkdir()
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            found: Any = "nothing"
            try:
                torch.set_num_threads(1)
                place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
                os.environ |= {name: str(value) for name, value in place.items()} | {LAUNCHED: str(folder)}
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                ranks = joined(60.0)
                found = work(ranks)
                ranks.meet()
                dist.destroy_process_group()
            except PerceiverError as error:
                found = f"{type(error).__name__}: {error}"
            except BaseException:
                found = traceback.format_exc()
            finally:
                (folder / str(rank)).write_text(json.dumps(found))
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(count)]


# ---------------------------------------------------------------- sums


def leaves(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(50, generator=generator) * 10.0**k for k in range(count)]


def sum_of_tree(parts: list[torch.Tensor]) -> torch.Tensor:
    tree = TreeSum()
    for index, part in enumerate(parts):
        tree.add(Node(0, index, [part.clone()]))
    return tree.total()[0]


@pytest.mark.parametrize("count", range(1, 10))
def test_a_tree_has_one_sum_whoever_adds_which_part(count: int) -> None:
    expected = sum_of_tree(leaves(count))
    for size in range(1, 6):
        whole = TreeSum()
        for rank in range(size):
            own = TreeSum()
            for leaf in Ranks(Place(rank, size)).share(count):
                own.add(Node(0, leaf, [leaves(count)[leaf].clone()]))
            for node in own.nodes:
                whole.add(node)
        assert torch.equal(whole.total()[0], expected)


def test_a_tree_of_four_adds_pairs_first() -> None:
    a, b, c, d = leaves(4)
    assert torch.equal(sum_of_tree([a, b, c, d]), (a + b) + (c + d))


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Any:
        def fail() -> None:
            raise DataError("a file is bad", "mend it")

        try:
            ranks.from_first(fail)
            error = "none"
        except DataError as raised:
            error = str(raised)
        tensors = [torch.full((3,), float(ranks.rank)), torch.ones(2, 2)]
        flat_total(tensors, ranks)
        parts, tree = leaves(5), TreeSum()
        for leaf in ranks.share(5):
            tree.add(Node(0, leaf, [parts[leaf].clone(), parts[leaf][:1].clone()]))
        total = tree_total(tree, [parts[0], parts[0][:1]], 5, ranks)
        return [
            ranks.totals([1.5, ranks.rank]),
            [data.decode() for data in ranks.gather(b"x" * ranks.rank)],
            ranks.exchange({"rank": ranks.rank}),
            ranks.from_first(lambda: ranks.rank + 7),
            error,
            tensors[0].tolist() + tensors[1].flatten().tolist(),
            torch.equal(total[0], sum_of_tree(parts)) and torch.equal(total[1], sum_of_tree(parts)[:1]),
        ]

    found = as_ranks(3, tmp_path / "talk", work)
    common = [[4.5, 3], [{"rank": 0}, {"rank": 1}, {"rank": 2}], 7, "a file is bad; mend it", [3.0] * 7, True]
    for rank, (totals, gathered, *rest) in enumerate(found):
        assert gathered == (["", "x", "xx"] if rank == 0 else [])
        assert [totals, *rest] == common


def test_a_process_that_ends_is_missed_by_the_others(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Any:
        if ranks.rank == 1:
            os._exit(0)
        return ranks.totals([1.0])

    with pytest.raises(FileNotFoundError):  # the second left nothing
        as_ranks(2, tmp_path / "lost", work)
    assert json.loads((tmp_path / "lost" / "0").read_text()).startswith(f"{LostError.__name__}: process 0 of 2 lost")


def test_batch_norms_average_in_the_order_of_the_batches() -> None:
    torch.manual_seed(0)
    batches = torch.randn(3, 4, 16, 16, 3)
    usual, stem = ConvStem(3, 8, same=True).train(), ConvStem(3, 8, same=True).train()
    stem.load_state_dict(usual.state_dict())
    for batch in batches:
        usual(batch)
    statistics = BatchStatistics(stem)
    statistics.begin()
    rows = {}
    for index in (2, 0, 1):  # as other processes would see them
        stem(batches[index])
        rows[index] = statistics.of_batch()
    statistics.replay(torch.stack([rows[index] for index in range(3)]), torch.ones(3))
    for name, buffer in usual.named_buffers():
        torch.testing.assert_close(stem.get_buffer(name), buffer, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- runs


def trained_by(count: int, data: Path, folder: Path, *changes: str, resume: bool = False) -> list[Any]:
    """Return the hash of the model, or the error, of each process of a run in `folder`/run."""

    def work(ranks: Ranks) -> Any:
        source = None if resume else data
        for _ in Trainer(source, folder / "run", overrides=[*RECIPE, *changes], resume=resume, ranks=ranks).fit():
            pass
        return sha256((folder / "run" / MODEL_FILE).read_bytes()).hexdigest()

    if count == 1:
        return [work(ALONE)]
    return as_ranks(count, folder / f"by-{count}-{resume}", work)


@pytest.fixture(scope="module")
def expected(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    (found,) = trained_by(1, bars, tmp_path_factory.mktemp("alone"))
    return str(found)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_make_the_model_of_one(count: int, bars: Path, tmp_path: Path, expected: str) -> None:
    assert trained_by(count, bars, tmp_path) == [expected] * count


def test_a_run_goes_on_with_another_number_of_processes(bars: Path, tmp_path: Path, expected: str) -> None:
    """The second of two is asked to stop, as by a signal; then one goes on."""

    def work(ranks: Ranks) -> Any:
        trainer = Trainer(bars, tmp_path / "run", overrides=RECIPE, ranks=ranks)
        for event in trainer.fit():
            if isinstance(event, StepDone) and event.step == 2 and ranks.rank == 1:
                trainer.stop()
        return load_state(tmp_path / "run").fields["step"]

    assert as_ranks(2, tmp_path / "stopped", work) == [2, 2]
    assert trained_by(1, bars, tmp_path, resume=True) == [expected]


def test_processes_must_be_alike(bars: Path, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Any:
        list(Trainer(bars, tmp_path / "run", overrides=[*RECIPE, f"train.seed={ranks.rank}"], ranks=ranks).fit())

    for words in as_ranks(2, tmp_path / "unlike", work):
        assert words.startswith("UsageError: recipe of process 1: ")
        assert words.endswith("all processes need the same program, data, options and run folder")


def test_an_unreadable_file_of_one_process_is_known_to_all(tmp_path: Path) -> None:
    """Too many of them end the run, in all processes with one error; with a higher limit it goes on."""
    data = write_images(tmp_path / "data", {"train/a": 8, "train/b": 8, "val/a": 2, "val/b": 2})
    for path in sorted((data / "train" / "a").iterdir())[:3]:
        path.write_bytes(path.read_bytes()[:60])
    tried = trained_by(2, data, tmp_path, "data.cache_bytes=0")
    assert len(set(tried)) == 1
    assert "3 of 16 files cannot be read, more than 1.0%" in tried[0]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    allowed = ("data.cache_bytes=0", "data.max_bad=0.5")
    assert trained_by(2, data, tmp_path / "a", *allowed) == trained_by(1, data, tmp_path / "b", *allowed) * 2


def test_a_step_is_cut_for_more_processes_than_batches() -> None:
    train, notes = tiny_config(["image"]).train, list[str]()
    cut = shared_out(train, 4, notes)
    assert (cut.batch_size, cut.accumulate) == (train.batch_size // 4, 4)
    assert len(notes) == 1
    assert shared_out(cut, 3, notes) is cut
    with pytest.raises(UsageError, match="a step of 3 examples cannot be divided among 4 processes"):
        shared_out(train.model_copy(update={"batch_size": 3}), 4, notes)


def test_processes_of_a_machine_decode_each_file_once(bars: Path, tmp_path: Path) -> None:
    """Each decodes half, and both have all: in a file that is gone, so that the memory is one."""

    def work(ranks: Ranks) -> Any:
        plan = Trainer(bars, tmp_path / "run", overrides=RECIPE, ranks=ranks).plan
        decoded, decode = 0, plan.reader.decode

        def counted(example: Example) -> Decoded:
            nonlocal decoded
            decoded += 1
            return decode(example)

        plan.reader.decode = counted  # type: ignore[method-assign]
        *_, done = preload_shared(plan.reader, plan.train_examples, 1 << 30, 0, ranks, lambda: False)
        arrays = [plan.reader.decode(example).arrays["image"] for example in plan.train_examples]
        alone = Trainer(bars, tmp_path / "other", overrides=RECIPE).plan.reader
        same = all(
            (alone.decode(e).arrays["image"] == a).all() for e, a in zip(plan.train_examples, arrays, strict=True)
        )
        return [done, decoded - len(arrays), same, any(array.flags.writeable for array in arrays)]

    found = as_ranks(2, tmp_path / "decoding", work)
    count = found[0][0]
    assert [done for done, *_ in found] == [count, count]
    assert sum(decoded for _, decoded, *_ in found) == count
    assert all(same and not writeable for *_, same, writeable in found)


def test_inputs_in_slices_give_the_gradients_of_one_process(tmp_path: Path) -> None:
    """Uneven slices of a grid of 64 x 64: a quarter and the rest."""
    layout = Layout(grid=(64, 64), channels=3, dims=2, bands=8, max_resolution=(64.0, 64.0))
    config = ModelConfig(
        num_latents=8, latent_channels=32, schedule="c0 t0 (c1 t0)x2", self_attends_per_block=1, num_self_heads=2
    )
    generator = torch.Generator().manual_seed(2)
    images, labels = torch.randn(2, 64, 64, 3, generator=generator), torch.tensor([3, 1])

    def gradients(logits: Callable[[Perceiver], torch.Tensor]) -> list[torch.Tensor]:
        model = Perceiver(config, {"image": layout}, 10)
        with torch.no_grad():
            model.head.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        torch.nn.functional.cross_entropy(logits(model), labels).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    def work(ranks: Ranks) -> Any:
        rows = [range(16), range(16, 64)][ranks.rank]
        own = {"image": Segment(images[:, rows.start : rows.stop])}
        sliced = gradients(lambda model: slice_logits(model, own, {"image": rows}, ranks))
        whole = gradients(lambda model: model({"image": Segment(images)}))
        largest = max(float(g.abs().max()) for g in whole)
        return max(float((a - b).abs().max()) for a, b in zip(sliced, whole, strict=True)) / largest

    for error in as_ranks(2, tmp_path / "slices", work):
        assert error < 1e-5  # other forms of the cross-attend, in float32


@pytest.mark.parametrize(("count", "kind"), [(2, "pairs"), (4, "bars")])
def test_a_run_of_teams_learns_what_one_process_does(
    count: int, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Teams of two, each process with a half of every example's inputs; of two modalities, with their encodings."""
    data = request.getfixturevalue(kind)
    small = SMALL_PAIRS if kind == "pairs" else (*SMALL, "inputs.image.stem=none")
    recipe = [*small, "train.batch_size=6", "train.accumulate=2", "train.steps=4", "train.optimizer=adamw"]

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / MODEL_FILE)

    def work(ranks: Ranks) -> Any:
        options = [*recipe, "train.split_inputs=2"]
        list(Trainer(data, tmp_path / "teams", overrides=options, ranks=ranks).fit())

    assert as_ranks(count, tmp_path / "processes", work) == [None] * count
    list(Trainer(data, tmp_path / "alone", overrides=recipe).fit())
    ours, expected = weights(tmp_path / "teams"), weights(tmp_path / "alone")
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert evaluate(Predictor(tmp_path / "teams"), data).num_examples > 0


def test_teams_need_their_processes_and_inputs_that_can_be_cut(bars: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"split_inputs=2 in 1 process, .* multiple of 2; pass --devices 2"):
        Trainer(bars, tmp_path / "run", overrides=[*SMALL, "train.split_inputs=2"])

    def work(ranks: Ranks) -> Any:
        Trainer(bars, tmp_path / "run", overrides=[*RECIPE, "train.split_inputs=2"], ranks=ranks)

    for words in as_ranks(2, tmp_path / "stem", work):
        assert words.startswith("UsageError: image inputs with the stem 'conv' cannot lie in slices")
        assert words.endswith("pass --set inputs.image.stem=none")
