"""A trial whose runs are made by several processes: the same results as by this one."""

import os
import shutil
import sys
from contextlib import chdir
from functools import partial

import pytest
import torch
from helpers import engines
from helpers.engines import ARM, SETTINGS, runs_in
from helpers.pictures import folder
from helpers.processes import Pool
from helpers.tuned import task
from safetensors.torch import load_file

from fastplastic.errors import FileError, InputError, ProcessError
from fastplastic.trials import OnRay, Results, RunNeeds, run_trial, with_controls
from fastplastic.trials import on_ray as on_ray_module

SMALL = ("trial", "test_resnet", "--no-pretrained", "--img-size", 32, "--data", "data", "-b", 8)
QUICK = ("--epochs", 1, "--evals", 2, "--profile-images", 16, "--seeds", 1)
ARMS = ("--arm", ARM, "--arm", "shrink-perturb")
ALL = (*SMALL, *QUICK, *ARMS, "--choose-split", 0.2, "-o", "best.safetensors")
NAMES = {(arm, seed) for arm in ("baseline", ARM, f"random:{ARM}") for seed in (0, 1)}


@pytest.fixture(scope="module")
def one_thread():
    """Run torch as the processes of the pool do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    made = []
    yield made
    for found in made:
        found.close()


@pytest.fixture
def pool(pools, tmp_path_factory):
    """Return two processes, new ones where one has died."""
    if not pools or not all(process.is_alive() for process in pools[-1]._processes):
        pools.append(Pool(2, str(tmp_path_factory.mktemp("store") / "store")))
    return pools[-1]


@pytest.fixture(scope="module")
def cluster():
    """Start Ray once for all tests: the engine takes one that is running."""
    import ray

    with pytest.MonkeyPatch.context() as patch, chdir(sys.prefix):
        # Where workers find the helpers, too.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.init(
            "local", num_cpus=2, include_dashboard=False, logging_level="error",
            log_to_driver=False, object_store_memory=100 * 2**20,
        )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def there(tmp_path_factory, one_thread):
    """Return a folder with images, and all that a trial in this process wrote beside them."""
    found = tmp_path_factory.mktemp("local")
    folder(found / "data" / "train")
    folder(found / "data" / "val", each=4, first=100)
    code, output, error = engines.command(0, found, *ALL)
    assert code == 0, error
    (found / "printed.txt").write_text(output)
    return found


@pytest.fixture
def here(there, tmp_path, monkeypatch):
    shutil.copytree(there / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_the_same(there, here, printed):
    """Compare results, weights and report with those of a trial in one process."""
    assert runs_in(here / "trial-test_resnet.jsonl") == runs_in(there / "trial-test_resnet.jsonl")
    for name in (
        "best.safetensors",
        f"trial-test_resnet.weights/{ARM.replace('@', '_').replace(':', '_')}.safetensors",
    ):
        ours, theirs = load_file(here / name), load_file(there / name)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    kept = {file.name for file in (there / "trial-test_resnet.weights").iterdir()}
    assert {file.name for file in (here / "trial-test_resnet.weights").iterdir()} == kept
    before = (there / "printed.txt").read_text()
    for part in ("verdict", "next: "):
        assert " ".join(before.partition(part)[2].split()) in " ".join(printed.split())


def test_on_ray(run, there, here, cluster):
    code, output, error = run(*ALL, "--engine", "ray")
    assert code == 0, error
    check_the_same(there, here, output)
    assert "runs     by Ray, on this machine: 1 CPU, 1 thread each" in output
    assert [line.partition(":")[0] for line in error.splitlines()] == [
        f"run {number} of 4" for number in range(1, 5)
    ]


def test_in_two_processes(there, here, pool):
    first, second = pool.run(engines.command, here, *ALL)
    assert first[0] == second[0] == 0, first[2]
    check_the_same(there, here, first[1])
    assert "runs     divided among 2 processes" in first[1]
    assert first[2].count("run ") == 4 and second[1:] == ("", "")
    first, second = pool.run(engines.command, here, *SMALL, "--engine", "ray")
    assert first == second
    assert "--engine ray in 2 processes: Ray starts those of the runs itself: start" in first[2]


def test_one_engine_goes_on_where_another_was(run, there, here, cluster, pool):
    whole = (there / "trial-test_resnet.jsonl").read_text().splitlines(keepends=True)
    file = here / "trial-test_resnet.jsonl"
    file.write_text("".join(whole[:2]))
    shutil.copytree(there / "trial-test_resnet.weights", here / "trial-test_resnet.weights")
    code, _, error = run(*ALL, "--engine", "ray")
    assert code == 0 and error.count("run ") == 3, error
    assert file.read_text().startswith("".join(whole[:2]))
    expected = runs_in(there / "trial-test_resnet.jsonl")
    assert runs_in(file) == expected
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    (here / "best.safetensors").unlink()
    code, _, error = pool.run(engines.command, here, *ALL)[0]
    assert code == 0 and error.count("run ") == 2, error
    assert runs_in(file) == expected


def on_ray(work, path, *, arms=(ARM,), seeds=(0, 1), warn=print, **more):
    """Make a small trial on Ray."""
    told = task(**more)
    engine = OnRay(work, {**SETTINGS.to_dict(), **told.facts}, RunNeeds(cpus=1), warn=warn)
    return run_trial(told, with_controls(arms), seeds, SETTINGS, engine=engine, results=path)


def test_a_run_that_fails_on_ray_is_named_and_others_are_kept(cluster, tmp_path):
    path = tmp_path / "trial.jsonl"
    for error, kind, said in [
        (FileError("no such image: a.png"), FileError, "no such image: a.png"),
        (ZeroDivisionError("by 0"), ProcessError, "ZeroDivisionError: by 0"),
    ]:
        with pytest.raises(kind) as raised:
            on_ray(partial(engines.failing_trainer, error), path)
        text = str(raised.value)
        assert text.startswith(f"{said} (in the run of ") and text.endswith(", seed 1)")
        assert "in failing" in raised.value.__notes__[0]
    assert {seed for _, seed in runs_in(path)} <= {0}
    with pytest.raises(FileError, match=r"no room \(in the run of .*, seed \d\)"):
        on_ray(engines.unkept_trainer, tmp_path / "unkept.jsonl")
    assert len(Results.read(tmp_path / "unkept.jsonl")) == 1


def test_a_worker_that_dies(cluster, tmp_path, monkeypatch):
    """The run is begun again, and given up in the end; the same command goes on."""
    monkeypatch.setattr(on_ray_module, "TRIES", 2)
    path, said = tmp_path / "trial.jsonl", []
    work = partial(engines.dying_trainer, tmp_path / "died", 2)
    with pytest.raises(ProcessError) as raised:
        on_ray(work, path, arms=[], seeds=(1,), warn=said.append)
    run = "the run of baseline, seed 1: its worker died"
    assert str(raised.value).startswith(f"{run} 2 times (WorkerCrashedError: ")
    assert [line.startswith(f"{run} (") and line[-6:] for line in said] == ["2 of 2"]
    on_ray(work, path, arms=[], warn=said.append)
    run_trial(task(), with_controls([]), (0, 1), SETTINGS, results=tmp_path / "local.jsonl")
    assert runs_in(path) == runs_in(tmp_path / "local.jsonl") and len(said) == 1


def test_a_worker_with_other_weights_is_refused(cluster, tmp_path):
    work = partial(engines.trainer, facts={"weights": "b"})
    with pytest.raises(InputError, match=r"weights is 'b' there, 'a' here.*on all machines"):
        on_ray(work, tmp_path / "trial.jsonl", facts={"weights": "a"})


def test_ctrl_c_ends_what_runs_on_ray(cluster, tmp_path, monkeypatch):
    cancelled = []
    real = cluster.cancel
    monkeypatch.setattr(
        cluster, "cancel", lambda *given, **more: (cancelled.append(more), real(*given, **more))
    )

    def stop(state):
        if state.run:
            raise KeyboardInterrupt

    path = tmp_path / "trial.jsonl"
    engine = OnRay(engines.trainer, SETTINGS.to_dict(), RunNeeds(cpus=1))
    with pytest.raises(KeyboardInterrupt):
        run_trial(
            task(),
            with_controls([ARM]),
            (0, 1),
            SETTINGS,
            engine=engine,
            results=path,
            progress=stop,
        )
    assert cancelled == [{}] * 5 and len(Results.read(path)) == 1
    assert cluster.is_initialized()


def test_runs_that_no_machine_has_room_for(cluster, tmp_path):
    told = task()
    for share, said in [
        (RunNeeds(cpus=3, threads=1), r"\(3 CPUs, 1 thread\): the largest has 2 CPUs and 0 GPUs"),
        (RunNeeds(cpus=1, gpus=0.5, threads=4), r"\(1 CPU, 0.5 GPUs, 4 threads\): the largest"),
    ]:
        engine = OnRay(engines.trainer, SETTINGS.to_dict(), share)
        with pytest.raises(InputError, match=said):
            run_trial(told, with_controls([ARM]), (0,), SETTINGS, engine=engine)


def test_processes_of_one_trial(pool, tmp_path, one_thread):
    path = tmp_path / "trial.jsonl"
    first, second = pool.run(engines.compared, path)
    local = engines.compared(0, None)
    assert (
        first[0] == second[0] == local[0] and {(arm, seed) for arm, seed, *_ in first[0]} == NAMES
    )
    assert (6, 6, True) in first[1] and second[1] == []
    assert set(runs_in(path)) == NAMES
    # All there already.
    before = path.read_bytes()
    assert [again[0] for again in pool.run(engines.compared, path)] == [local[0]] * 2
    assert path.read_bytes() == before
    # What one of them has differs, cannot be, or fails.
    said = (
        "trial: the seeds is [0, 2] in process 1 and [0, 1] in process 0, expected the same in all"
    )
    assert pool.run(engines.differing, path) == [("ProcessError", said)] * 2
    (tmp_path / "other").write_text("notes\n")
    refused = pool.run(engines.compared, tmp_path / "other")
    assert refused[0] == refused[1] and "other: line 1 is no JSON object" in refused[0][1]
    model = partial(engines.failing, error=FileError("no such image: a.png"))
    failed = pool.run(engines.compared, tmp_path / "failed", model)
    assert (
        failed[0]
        == failed[1]
        == ("FileError", f"no such image: a.png (in the run of {ARM}, seed 1, process 1)")
    )
    assert {seed for _, seed in runs_in(tmp_path / "failed")} <= {0}
    model = partial(engines.failing_here, error=ZeroDivisionError("by 0"))
    failed = pool.run(engines.compared, tmp_path / "failed", model)
    assert failed[0] == failed[1] and failed[0][0] == "ProcessError"
    (said, size), other = pool.run(engines.tuned)
    assert (said, size) == other and said.startswith("finetune in one of 2 processes: it trains in")


def test_a_process_that_dies(pool, tmp_path):
    for pipe in pool._pipes:
        pipe.send((engines.left, (tmp_path / "trial.jsonl",)))
    done, said = pool._pipes[0].recv()
    gone = "trial: process 1 is gone: finished runs are kept, the same command goes on"
    assert done and said == ("ProcessError", gone)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--address", "auto"), "--address auto: is for runs on Ray: add --engine ray"),
        (("--cpus-per-run", "1"), "--cpus-per-run 1.0: is for runs on Ray"),
        (("--engine", "dask"), "'dask' is not one of 'local', 'ray'"),
        (("--engine", "ray", "--cpus-per-run", "-1"), "--cpus-per-run -1: expected more than 0"),
        (("--engine", "ray", "--cpus-per-run", "0"), "--cpus-per-run 0: expected more than 0"),
        (("--engine", "ray", "--cpus-per-run", "nan"), "--cpus-per-run nan: expected more than 0"),
        (("--engine", "ray", "--gpus-per-run", "-1"), "--gpus-per-run -1: expected 0, or more"),
        (
            ("--engine", "ray", "--gpus-per-run", "1.5"),
            "--gpus-per-run 1.5: expected whole ones, or",
        ),
        (("--engine", "ray", "--gpus-per-run", "0.00001"), "expected four decimal places at most"),
        (
            ("--engine", "ray", "--device", "cuda:1"),
            "--device cuda:1: Ray chooses the GPU of a run",
        ),
        (("--engine", "ray", "--device", "cuda", "--gpus-per-run", "0"), "--gpus-per-run 0 beside"),
        (("--engine", "ray", "--device", "cpu", "--gpus-per-run", "1"), "--gpus-per-run 1 beside"),
    ],
)
def test_options_that_are_refused(run, nothing_slow, here, arguments, said):
    code, output, error = run(*SMALL, *arguments)
    assert (code, output, error.count("\n")) == (2, "", 1) and said in error


def test_without_ray(run, nothing_slow, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, error = run(*SMALL, "--engine", "ray")
    assert code == 2
    assert '--engine ray needs Ray: pip install "fastplastic[ray]", or leave it out' in error


def test_an_address_where_nobody_answers(monkeypatch, tmp_path):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    engine = OnRay(engines.trainer, SETTINGS.to_dict(), RunNeeds(cpus=1), address="127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"--address 127\.0\.0\.1:9: there is no cluster of Ray \("
    ):
        run_trial(task(), with_controls([ARM]), (0,), SETTINGS, engine=engine)


def test_threads_are_those_of_the_program(cluster, tmp_path):
    """Whatever Ray has given the worker: bits depend on it."""
    assert RunNeeds(cpus=1).threads == torch.get_num_threads()
    assert str(RunNeeds(cpus=0.5, gpus=1, threads=2)) == "0.5 CPUs, 1 GPU, 2 threads"
    told = task(facts={"threads": 3})
    facts = {**SETTINGS.to_dict(), **told.facts}
    engine = OnRay(engines.threads_trainer, facts, RunNeeds(cpus=1, threads=3))
    found = run_trial(told, with_controls([]), (0,), SETTINGS, engine=engine)
    assert len(found.runs) == 1
