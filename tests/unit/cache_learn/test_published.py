"""Released Learning-to-Cache routers: files of their shape, written here, against their counts, their loop and a live DiT."""

import argparse
import json
import os
import runpy
import sys

import pytest
import torch
from diffusers import DDIMScheduler

from tasks.cache_learn.published import main, published_plan, read_router
from tasks.core.denoiser import build
from tasks.core.hooks import record, rewrite
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, network, sample
from tasks.pretrain_load.architectures import SCHEDULE, dit
from tasks.runtime.cache import apply_cache, remove_cache

ON, OFF = 3.0, -5.0  # logits of beta 0.953 and 0.007
# METHODS.md, section 2: computed sublayers per cache step of the released files (n rising), and of those attention
DIT20 = (56, 55, 55, 55, 53, 26, 8, 4, 0, 0)
DIT50 = (56, 56, 55, 55, 56, 55, 55, 55, 55, 54, 54, 36, 29, 26, 11, 8, 7, 6, 2, 1, 3, 0, 0, 1, 0)
UVIT20 = (0, 2, 6, 6, 8, 16, 49, 52, 50)
UVIT50 = (0,) * 9 + (1, 1, 2, 2, 4, 4, 4, 3, 2, 2, 6, 8, 11, 15, 23)


def dit_file(path, routers, **more):
    """As their train_router.py saves it."""
    options = argparse.Namespace(model="DiT-XL/2", l1=5e-06, lr=0.001, ste_threshold=None, wandb=True)
    torch.save({"routers": routers, "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "args": options, **more}, path)
    return path


def random_routers(steps, length, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {f"{n}.prob": torch.randn(length, generator=rng) * 2 for n in range(steps)}


def patterned(counts, attention, blocks):
    """Logits with `counts` computed sublayers per cache step, `attention` of them attention, at the even positions."""
    ours = [max(0, count - blocks) for count in counts]  # attention of each step; the rest is feed-forward
    for i in range(len(counts)):
        ours[i] += min(attention - sum(ours), min(blocks, counts[i]) - ours[i])
    rng = torch.Generator().manual_seed(len(counts))
    rows = torch.full((len(counts), blocks, 2), OFF)
    for row, count, a in zip(rows, counts, ours, strict=True):
        row[torch.randperm(blocks, generator=rng)[:a], 0] = ON
        row[torch.randperm(blocks, generator=rng)[:count - a], 1] = ON
    return rows.flatten(1)


@pytest.mark.parametrize("counts, theta, removed, attention_share, ff_share",
                         [(DIT20, 0.1, 248, 0.4393, 0.4464), (DIT50, 0.1, 664, 0.4700, 0.4785)])
def test_dit_counts_of_the_paper(tmp_path, counts, theta, removed, attention_share, ff_share):
    """Table 4's shares of the cache steps and the recount of METHODS.md, on a file whose unused routers say the reverse."""
    steps, cells = 2 * len(counts), 28 * len(counts)
    rows = patterned(counts, round(cells * (1 - attention_share)), 28)
    routers = {f"{n}.prob": rows[n // 2] if n % 2 == 0 else -rows[n // 2] for n in range(steps)}
    plan = published_plan(read_router(dit_file(tmp_path / "r.pt", routers), steps), theta)
    computed = torch.tensor(plan.compute)
    assert int((~computed).sum()) == removed
    assert computed[::2].all(), "the first of each pair is computed in full"
    assert tuple(computed[1::2].sum(1).tolist()) == counts[::-1], "sampling starts at the highest noise"
    for part, share in (("attn1", attention_share), ("ff", ff_share)):
        ours = [name.endswith(part) for name in plan.sublayers]
        assert (~computed[:, ours]).sum().item() / cells == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("counts, removed, attention_share, mlp_share",
                         [(UVIT20, 522 - 189, 0.6054, 0.6705), (UVIT50, 1392 - 88, 0.9325, 0.9411)])
def test_uvit_counts_of_the_paper(tmp_path, counts, removed, attention_share, mlp_share):
    steps, cells = 2 * (len(counts) + 1), 29 * len(counts)
    rows = patterned(counts, round(cells * (1 - attention_share)), 29)
    unused = torch.full((58,), OFF)
    used = {f"{n}.prob": rows[n - 1] for n in range(1, len(counts) + 1)}
    torch.save({**{f"{n}.prob": unused for n in range(steps)}, **used}, tmp_path / "r.pth")
    router = read_router(tmp_path / "r.pth", steps)
    plan = published_plan(router, 0.9)
    computed = torch.tensor(plan.compute)
    assert int((~computed).sum()) == removed
    assert computed[1::2].all() and computed[0].all(), "the midpoint of every solver step, and all of the first one"
    assert tuple(computed[2::2].sum(1).tolist()) == counts
    for part, share in ((".attn", attention_share), (".mlp", mlp_share)):
        ours = [name.endswith(part) for name in plan.sublayers]
        assert (~computed[:, ours]).sum().item() / cells == pytest.approx(share, abs=1e-4)
    assert plan.sublayers[:2] == ("in_blocks.0.attn", "in_blocks.0.mlp") and plan.sublayers[-1] == "out_blocks.13.mlp"
    assert plan.sublayers[28:30] == ("mid_block.attn", "mid_block.mlp") and router.timesteps is None


def test_every_computed_cell_is_where_their_loop_computes_it(tmp_path):
    """Their DiT walks its timesteps down, counts calls from 19 down, forgets at odd counts, and looks n up by timestep."""
    steps, blocks, theta = 50, 3, 0.3
    routers = random_routers(steps, 2 * blocks)
    rising = sorted(read_router(dit_file(tmp_path / "r.pt", routers), steps, blocks).timesteps)
    count, memory, expected = 19, set(), []
    for t in rising[::-1]:
        if count % 2 == 1:
            memory = set()
        beta = torch.sigmoid(routers[f"{rising.index(t)}.prob"])
        expected.append(tuple(not (i in memory and not beta[i] > theta) for i in range(2 * blocks)))
        memory, count = set(range(2 * blocks)), count - 1
    plan = published_plan(read_router(tmp_path / "r.pt", steps, blocks), theta)
    assert plan.compute == tuple(expected)
    assert 0 < plan.removed_share < 0.5


def test_every_computed_cell_is_where_their_uvit_computes_it(tmp_path):
    """Calls alternate between conditional and unconditional; both memories are emptied at every call 4 k + 2."""
    steps, blocks, theta = 10, 5, 0.4
    routers = random_routers(steps, 2 * blocks)
    torch.save(routers, tmp_path / "r.pth")
    memory, computed = [set(), set()], []
    for call in range(2 * steps):
        if call % 4 == 2:
            memory = [set(), set()]
        beta = torch.sigmoid(routers[f"{call // 4}.prob"])
        computed.append(tuple(not (i in memory[call % 2] and not beta[i] > theta) for i in range(2 * blocks)))
        memory[call % 2] = set(range(2 * blocks))
    assert computed[::2] == computed[1::2]
    assert published_plan(read_router(tmp_path / "r.pth", steps, blocks), theta).compute == tuple(computed[::2])


def test_by_hand(tmp_path):
    """4 steps, 1 block: n = 2 is step 1, n = 0 is step 3; logit 0 is beta 0.5, and 0.5 is not above 0.5."""
    routers = {"0.prob": torch.tensor([-1.0, 1.0]), "1.prob": torch.tensor([9.0, 9.0]),
               "2.prob": torch.tensor([0.1, 0.0]), "3.prob": torch.tensor([-9.0, -9.0])}
    router = read_router(dit_file(tmp_path / "r.pt", routers), 4, 1)
    assert router.timesteps == (999, 666, 333, 0)
    assert published_plan(router, 0.5).compute == ((True, True), (True, False), (True, True), (False, True))
    assert all(map(all, published_plan(router, 0.0).compute)), "no sigmoid is 0"
    assert published_plan(router, 1.0).removed_share == 0.5, "nor above 1"
    for theta in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"theta: {theta} is not between 0 and 1"):
            published_plan(router, theta)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_timesteps_are_those_of_their_respacing(tmp_path, steps):
    scheduler = DDIMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    router = read_router(dit_file(tmp_path / "r.pt", random_routers(steps, 2)), steps, 1)
    assert list(router.timesteps) == scheduler.timesteps.tolist()


# ---- on a live model

@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    denoiser = build("DiTTransformer2DModel", dit(8, 1, 4, width=16, depth=3, heads=2, patch=4), SCHEDULE)
    denoiser.model.eval().requires_grad_(False)
    for parameter in denoiser.model.parameters():  # adaLN-Zero starts with gates of 0, where no sublayer counts
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return denoiser


def drawn(denoiser, plan, timesteps):
    """(images, calls of each sublayer) of a trajectory with the plan live; None: the plain model."""
    names, calls, hooks = [s.name for s in denoiser.sublayers()], {}, []
    for name in names:  # below the sublayer's own forward: what is skipped does not reach it
        calls[name] = 0
        inner = next(m for m in denoiser.model.get_submodule(name).modules() if isinstance(m, torch.nn.Linear))
        hooks.append(inner.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)))
    handle = apply_cache(denoiser.model, plan.sublayers, plan.compute) if plan else None

    def predict(x, t, labels, step):
        if handle:
            handle.step = step
        return denoiser(x, t, labels)

    try:
        images = sample(predict, denoiser.schedule, Recipe(timesteps=timesteps, cache=plan),
                        initial_noise(denoiser.sample_shape, range(3), 0), labels_for(range(3), denoiser.num_classes))
    finally:
        remove_cache(denoiser.model)
        for hook in hooks:
            hook.remove()
    return images, calls


def test_names_are_those_of_a_diffusers_dit(tmp_path, tiny):
    router = read_router(dit_file(tmp_path / "r.pt", random_routers(4, 6)), 4, 3)
    assert list(router.sublayers) == [s.name for s in tiny.sublayers()]


def test_a_plan_that_computes_everything_is_the_plain_model(tmp_path, tiny):
    router = read_router(dit_file(tmp_path / "r.pt", random_routers(6, 6)), 6, 3)
    everything = published_plan(router, 0.0)
    plain, calls = drawn(tiny, None, router.timesteps)
    cached, with_plan = drawn(tiny, everything, router.timesteps)
    assert torch.equal(plain, cached) and calls == with_plan == dict.fromkeys(everything.sublayers, 6)
    again = sample(network(tiny), tiny.schedule, Recipe(timesteps=router.timesteps),
                   initial_noise(tiny.sample_shape, range(3), 0), labels_for(range(3), tiny.num_classes))
    assert torch.equal(again, plain), "no trace is left"


def test_an_imported_plan_runs_live_and_skips_what_it_says(tmp_path, tiny):
    router = read_router(dit_file(tmp_path / "r.pt", random_routers(6, 6, seed=3)), 6, 3)
    plan = published_plan(router, 0.5)
    plain, _ = drawn(tiny, None, router.timesteps)
    cached, calls = drawn(tiny, plan, router.timesteps)
    assert calls == {name: sum(column) for name, column in zip(plan.sublayers, zip(*plan.compute, strict=True), strict=True)}
    assert 0 < sum(calls.values()) < 6 * 6 and not torch.equal(plain, cached)

    kept = []

    def predict(x, t, labels, step):
        """Every second step puts out, where the plan says so, what the recorded step before did."""
        if step % 2 == 0:
            with record(tiny.model, plan.sublayers) as outputs:
                prediction = tiny(x, t, labels)
            kept[:] = outputs
            return prediction
        with rewrite(tiny.model, plan.sublayers, lambda i, fresh: fresh if plan.compute[step][i] else kept[i]):
            return tiny(x, t, labels)

    by_hand = sample(predict, tiny.schedule, Recipe(timesteps=router.timesteps),
                     initial_noise(tiny.sample_shape, range(3), 0), labels_for(range(3), tiny.num_classes))
    assert torch.equal(cached, by_hand)


# ---- bad files

class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


class Foreign:
    """Allowed by somebody else in this process."""


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_in_one_line_and_never_runs(tmp_path, zipped):
    marker = tmp_path / "ran"
    torch.save({"routers": random_routers(2, 56), "args": Malicious(marker)}, tmp_path / "r.pt",
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"r\.pt: refused: it names \w+\.system, but only tensors") as caught:
        read_router(tmp_path / "r.pt", 2)
    assert "\n" not in str(caught.value) and not marker.exists()
    torch.load(tmp_path / "r.pt", weights_only=False)
    assert marker.exists(), "a file that does run where it is unpickled freely"


def test_what_others_have_allowed_is_not_allowed_here(tmp_path):
    path = dit_file(tmp_path / "r.pt", random_routers(2, 56), more=Foreign())
    with torch.serialization.safe_globals([Foreign]):
        allowed = set(torch.serialization.get_safe_globals())
        torch.load(dit_file(tmp_path / "plain.pt", {}, args=Foreign()), weights_only=True)
        with pytest.raises(ValueError, match="refused: it names .*Foreign"):
            read_router(path, 2)
        assert set(torch.serialization.get_safe_globals()) == allowed
    assert not {Foreign, argparse.Namespace} & set(torch.serialization.get_safe_globals())


@pytest.mark.parametrize("kept", [0, 1, 3, 50, 0.5, 0.99])
def test_a_truncated_file(tmp_path, kept):
    path = dit_file(tmp_path / "r.pt", random_routers(2, 56))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"r\.pt: not a whole file of torch\.save's") as caught:
        read_router(path, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("routers, message", [
    (random_routers(2, 56) | {"1.prob": torch.zeros(55)}, r"1\.prob is torch\.float32 of shape \(55,\), expected shape"),
    (random_routers(2, 58), r"0\.prob is torch\.float32 of shape \(58,\), expected shape \(56,\): .* of 28 blocks"),
    ({"0.prob": torch.zeros(56)}, r"1\.prob is missing; expected one for each of 2 steps"),
    (random_routers(4, 56), r"holds '2\.prob', expected 0\.prob to 1\.prob: was it trained for 2 steps\?"),
    (random_routers(2, 56) | {"2.bias": torch.zeros(56)}, r"holds '2\.bias', expected 0\.prob to 1\.prob"),
    (random_routers(2, 56) | {"1.prob": torch.full((56,), float("nan"))}, r"1\.prob holds nan, expected finite numbers"),
    (random_routers(2, 56) | {"0.prob": torch.tensor([1.0] * 55 + [float("-inf")])}, r"0\.prob holds -inf, expected finite"),
    (random_routers(2, 56) | {"0.prob": torch.ones(56, dtype=torch.int64)}, r"0\.prob is torch\.int64 .*, expected .* floats"),
    (random_routers(2, 56) | {"0.prob": [0.0] * 56}, r"0\.prob is list, expected a dense vector of floats"),
    (random_routers(2, 56) | {"0.prob": torch.zeros(56).to_sparse()}, r"0\.prob is .*, expected a dense vector of floats"),
    (random_routers(2, 56) | {"0.prob": torch.zeros(56, device="meta")}, r"0\.prob is .*, expected a dense vector of floats"),
])
def test_bad_routers(tmp_path, routers, message):
    path = dit_file(tmp_path / "r.pt", routers)
    with pytest.raises(ValueError, match=r"r\.pt: " + message) as caught:
        read_router(path, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, found", [
    ({"model": {}, "ema": {}}, "a dict of 'model', 'ema'"), ({}, "a dict of nothing"), (torch.zeros(56), "Tensor"),
    ({"routers": [torch.zeros(56)]}, "a dict of 'routers'"),
    ({"0.prob": torch.zeros(58), "opt": {}}, "a dict of '0.prob', 'opt'"),
])
def test_a_file_without_routers(tmp_path, content, found):
    torch.save(content, tmp_path / "r.pt")
    with pytest.raises(ValueError, match=f"r.pt: holds {found}, expected a dict `routers` .DiT. or `<n>.prob` alone .U-ViT."):
        read_router(tmp_path / "r.pt", 2)


@pytest.mark.parametrize("steps, blocks, message", [
    (3, None, "steps: 3 is odd"),
    (0, None, "steps: 0 is not between 2 and 1000"), (2, 0, "blocks: 0 is not between 1 and 1000"),
    (2, 28, "blocks: 28 is even, a U-ViT has one in the middle")])
def test_bad_arguments(tmp_path, steps, blocks, message):
    torch.save(random_routers(2, 58), tmp_path / "r.pth")
    with pytest.raises(ValueError, match=message):
        read_router(tmp_path / "r.pth", steps, blocks)


@pytest.mark.parametrize("name", ["missing.pt", "."])
def test_no_such_file(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be read: (No such file|Is a directory)"):
        read_router(tmp_path / name, 2)


# ---- the entry point

def test_the_command_writes_a_plan_like_the_stage(tmp_path, capsys):
    path = dit_file(tmp_path / "r.pt", random_routers(4, 56))
    main([str(path), "--steps", "4", "--theta", "0.1", "--out", str(tmp_path / "plan.json")])
    written = json.loads((tmp_path / "plan.json").read_text())
    router = read_router(path, 4)
    plan = published_plan(router, 0.1)
    assert written.keys() == {"timesteps", "sublayers", "compute", "forecast", "weights"}
    recipe = Recipe.from_json({**Recipe(timesteps=written.pop("timesteps")).to_json(), "cache": written})
    assert recipe == Recipe(timesteps=router.timesteps, cache=plan)
    assert f"of 224 sublayer evaluations removed ({plan.removed_share:.1%})" in capsys.readouterr().out


def test_the_command_gives_uvit_no_timesteps(tmp_path):
    torch.save(random_routers(4, 58), tmp_path / "r.pth")
    main([str(tmp_path / "r.pth"), "--steps", "4", "--theta", "0.9", "--out", str(tmp_path / "plan.json")])
    assert json.loads((tmp_path / "plan.json").read_text()).keys() == {"sublayers", "compute", "forecast", "weights"}


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch):
    path, out = dit_file(tmp_path / "r.pt", random_routers(4, 55)), tmp_path / "plan.json"
    monkeypatch.setattr(sys, "argv", ["published", str(path), "--steps", "4", "--theta", "0.1", "--out", str(out)])
    monkeypatch.delitem(sys.modules, "tasks.cache_learn.published")
    with pytest.raises(SystemExit) as left:
        runpy.run_module("tasks.cache_learn.published", run_name="__main__")
    assert left.value.code == f"error: {path}: 0.prob is torch.float32 of shape (55,), expected shape (56,): attention and " \
                              "feed-forward of 28 blocks"
    assert not out.exists()
    good = dit_file(tmp_path / "good.pt", random_routers(4, 56))
    with pytest.raises(SystemExit, match="error: .*No such file"):
        main([str(good), "--steps", "4", "--theta", "0.1", "--out", str(tmp_path / "absent" / "plan.json")])
