"""The project's chores: ``nox -s study -- FILE [options]``, ``nox -s quick``, ``nox -s tests``, ``nox -s slurm``,
``nox -s lint``, ``nox -s types``.

Environments are made once and reused; every version comes from constraints.txt.
"""

import os

import nox

nox.needs_version = ">=2024.4.15"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = True


def install(session: nox.Session, *requirements: str) -> None:
    """Install the project in development mode, with ``requirements`` as its extras, at the pinned versions."""
    extras = f"[{','.join(requirements)}]" if requirements else ""
    # The build backend's own isolated environment does not see the constraints, and needs none of them.
    session.install("--quiet", "-c", "constraints.txt", "-e", f".{extras}")


@nox.session
def study(session: nox.Session) -> None:
    """Run a study: ``nox -s study -- studies/quickstart.yaml [options]``."""
    if not session.posargs:
        session.error("which study? For example: nox -s study -- studies/quickstart.yaml")
    install(session)
    session.run("python", "-m", "hpdm_core.study", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; posargs go to pytest (``-m slow`` for those that take minutes)."""
    install(session, "test", "postgres", "dashboard")
    # One thread per worker: two workers on two cores beat one worker with two threads.
    arguments = session.posargs or ["-n", "2", "-m", "not slow and not slurm and not gpu", "-q"]
    session.run("python", "-m", "pytest", *arguments, env={"OMP_NUM_THREADS": "1"})


QUICK = (
    *(f"tests/{name}.py" for name in ("test_diffusion", "test_pyramid")),
    *(f"tests/{name}" for name in ("model", "plugins")),
    *(f"tests/config/test_{name}.py" for name in ("compose", "keys", "loader", "overrides", "study_file")),
    *(f"tests/training/test_{name}.py" for name in ("ema", "lamb", "schedule", "step")),
    *(f"tests/sampling/test_{name}.py" for name in ("parents", "solver")),
    *(f"tests/metrics/test_{name}.py" for name in ("frechet", "preprocessing")),
    *(f"tests/study/test_{name}.py" for name in ("cells", "retries", "states")),
)
"""The mathematics, the model, configuration, plugins, and what becomes of a job: no subprocess, no study is run."""


@nox.session
def quick(session: nox.Session) -> None:
    """Run the tests that start no process and run no study, within a minute."""
    install(session, "test")
    session.run(
        "python", "-m", "pytest", "-n", "2", "-m", "not slow", "-q", *QUICK, env={"OMP_NUM_THREADS": "1"}
    )


@nox.session
def slurm(session: nox.Session) -> None:
    """Start real SLURMs of two nodes on this machine (Debian or Ubuntu, as root) and run their tests."""
    if os.getuid() != 0:
        session.skip("a SLURM of its own takes root, to install and to start its daemons; nothing was tested")
    install(session, "test")
    session.run("python", "tests/slurm/cluster.py", "install")
    # Two clusters side by side: most of the time is waiting for one.
    arguments = session.posargs or ["-n", "2", "--dist", "worksteal", "-q", "-rs", "--durations=5"]
    environment = {"OMP_NUM_THREADS": "1", "HPDM_SLURM": "required"}
    session.run("python", "-m", "pytest", "-m", "slurm", "tests/slurm", *arguments, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style (ruff) and the direction of imports (import-linter)."""
    # These tools read the source and import none of it: the project's own requirements are not needed.
    tools = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["lint"]
    session.install("--quiet", "-c", "constraints.txt", *tools)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join([".", "plugins"])})


@nox.session
def types(session: nox.Session) -> None:
    """Check types: mypy strict on hpdm_core."""
    install(session, "types")
    session.run("mypy")
