# `make demo` and `make test` both work as the first command after `git clone`: each sets up .venv once.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/phantom_demo
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-slurm lint clean lock

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] < (3, 13) else "imitate_ds needs Python 3.11 or 3.12; this is %d.%d. Try: make PYTHON=python3.11 $(MAKECMDGOALS)" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# Three minutes of the real thing on two cores: shards, embeddings, two DeepSpeed ranks, evaluation, report.
demo: setup shards/phantom/text.json
	$(BIN)/deepspeed --num_gpus 2 --module imitate_ds.pretrain --config launch/runs/phantom_demo.yaml
	$(BIN)/imitate-ds evaluate retrieval --model $(RUN)/export --shards shards/phantom --out $(RUN)
	$(BIN)/imitate-ds evaluate zero-shot --model $(RUN)/export --shards shards/phantom --out $(RUN)
	$(BIN)/imitate-ds evaluate probe --model $(RUN)/export --shards shards/phantom --out $(RUN)
	@echo
	@echo "Done. All of it is in $(RUN)/ (synthetic data: the figures say that the program works, nothing about medicine)"
	@echo "  report       $(RUN)/report.html      figures as JSON: $(RUN)/results.json"
	@echo "  weights      $(RUN)/export           load with: imitate_ds.load_model('$(RUN)/export')"
	@echo "  curves       $(BIN)/tensorboard --logdir $(RUN)/tensorboard"
	@echo "  checkpoints  $(RUN)/checkpoints"
	@echo "Next: your own data. README.md, 'Real data'."

shards/phantom/index.json: | setup
	$(BIN)/imitate-ds shards build phantom --out shards/phantom --option studies=2000 --option val_share=0.15

shards/phantom/text.json: shards/phantom/index.json
	$(BIN)/imitate-ds shards embed shards/phantom --text-encoder lsa

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Ten minutes: launch/*.sbatch on a real Slurm whose three nodes, on this machine, lose power and network. Needs root; what else it
# needs is installed where that is possible, and where it is not the tests are skipped and say why.
test-slurm: setup
	@command -v slurmctld >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
		{ apt-get -qq update; apt-get -qq install --no-install-recommends -y slurmctld slurmd slurm-client munge iproute2; }
	$(BIN)/pytest -m cluster tests/cluster

lint: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# After a change of dependencies in pyproject.toml: what pip would install today, pinned.
lock:
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report .venv/report.json '.[test,dicom,remote]'
	$(BIN)/python -c 'import json; items = [i["metadata"] for i in json.load(open(".venv/report.json"))["install"]]; print(*sorted(m["name"].lower() + "==" + m["version"] for m in items if m["name"] != "imitate-ds"), sep="\n")' > requirements.lock

clean:
	rm -rf .venv $(RUN) shards/phantom
