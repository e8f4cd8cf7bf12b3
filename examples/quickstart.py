# %% [markdown]
# # Quickstart
#
# From interactions to recommendations with a known privacy cost, on the built-in sample. Run it as a program
# (`python examples/quickstart.py`), or cell by cell in an editor that knows `# %%`. It takes half a minute and writes
# into `out/quickstart`.

# %%
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib as mpl

from lazydp.api import Client, evaluate, export, ingest, train

mpl.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "out/quickstart")
LEDGER = f"sqlite:///{OUT / 'ledger.db'}"
COMMAND = [sys.executable, "-m", "lazydp.pipelines.cli"]  # `lazydp`, of this very environment

shutil.rmtree(OUT, ignore_errors=True)
OUT.mkdir(parents=True)

# %% [markdown]
# ## Data
#
# The sample has a log of interactions, tables of users and items, and a feature spec that describes all three. The
# dataset that ingest makes of them is as private as they are.

# %%
size = ["--users", "500", "--items", "200", "--interactions", "8000"]
subprocess.run([*COMMAND, "sample-data", "--out", OUT / "sample", *size], check=True)
dataset = ingest(input=OUT / "sample" / "interactions.parquet", spec=OUT / "sample" / "spec.yaml", out=OUT / "dataset")
print(dataset.manifest.counts)

# %% [markdown]
# ## Budget
#
# Nothing is trained before somebody said how much may be spent on these people, and nothing is released without an
# entry in the ledger.

# %%
budget = ["--epsilon", "10", "--delta", "1e-5", "--privacy-unit", "user", "--ledger", LEDGER]
subprocess.run([*COMMAND, "budget", "set", "--dataset", OUT / "dataset", *budget], check=True)

# %% [markdown]
# ## Training
#
# Epsilon is for one person, all of whose examples are clipped together. `sampling_prob`, `expected_batch_size` and
# `steps` are public settings: chosen, never counted from the data. lazydp finds the noise that makes the whole run cost
# epsilon 8.

# %%
settings = {
    "model": {"kind": "two_tower", "embedding_dim": 16},
    "privacy_unit": "user",
    "sampling": "user",
    "user_gradient": "mean",
    "sampling_prob": 1.0,
    "expected_batch_size": 500,
    "steps": 25,
    "target_epsilon": 8,
    "target_delta": 1e-5,
    "max_grad_norm": 0.1,
    "negatives": 8,
    "embeddings": {"learning_rate": 100, "schedule": {"kind": "cosine"}},
    "dense": {"optimizer": "adam", "learning_rate": 0.003, "schedule": {"kind": "cosine"}},
}
run = train(dataset=OUT / "dataset", config=settings, out=OUT / "run", ledger=LEDGER)

# %% [markdown]
# ## Release
#
# All pending noise is applied and proven applied, the budget is committed, and the noise key is destroyed. The bundle
# says what it cost each person.

# %%
bundle = export(run=run.folder, dataset=OUT / "dataset", out=OUT / "bundle", ledger=LEDGER)
print(bundle.statement.line())
print(evaluate(bundle=OUT / "bundle", dataset=OUT / "dataset").table())

# %% [markdown]
# ## Epsilon over steps
#
# The first step costs most of all: epsilon grows roughly with the square root of the number of steps.

# %%
spent = bundle.statement.epsilon_over_steps
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot([point.step for point in spent], [point.epsilon for point in spent], marker=".")
axes.set(xlabel="steps", ylabel=f"epsilon at delta {bundle.statement.delta:g}", ylim=(0, None))
axes.grid(alpha=0.3)
figure.savefig(OUT / "epsilon.svg")
print(f"epsilon over steps: {OUT / 'epsilon.svg'}")

# %% [markdown]
# ## Recommendations
#
# The service answers from the bundle, and tells what was spent.

# %%
port_file = OUT / "port"
serve = ["serve", "--bundle", OUT / "bundle", "--ledger", LEDGER, "--port", "0", "--port-file", port_file]
with (OUT / "service.log").open("w") as log:
    service = subprocess.Popen([*COMMAND, *serve], stdout=log, stderr=log)
try:
    while not (port_file.exists() and port_file.read_text().strip()):
        if service.poll() is not None:
            sys.exit(f"the service did not start: see {OUT / 'service.log'}")
        time.sleep(0.1)
    with Client(f"http://127.0.0.1:{port_file.read_text().strip()}") as client:
        for item in client.recommend_to_user("1", k=5).items:
            print(f"{item.score:8.3f}  {item.title}")
        shop = client.budget().datasets[0]
        print(f"spent {shop.epsilon_spent:.3f} of {shop.epsilon_budget:g}")
finally:
    service.terminate()
    service.wait()
