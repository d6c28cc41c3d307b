# Everything runs from a fresh clone with nothing but Python 3.11 to 3.13 and make.
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo
EXTRAS := export,ort,openvino,serve,streams,mcap,dev
# A plain path, which type checkers read, too; the default mode's import hook they do not.
EDITABLE := --config-settings editable_mode=compat
OLDEST := build/oldest
OLDEST_PYTHON ?= $(PYTHON)
# What `make test-newest` runs: the runtime, the built-in model's export, two families, what is built.
QUICK := tests/runtime/test_pipeline.py tests/export/test_builtin.py tests/export/families/test_qwen.py \
  tests/export/families/test_split.py tests/engines/test_cpu.py tests/packaging
KILLS ?= 200
SOAK ?= 3600
# Files go to workers in the order of tests/conftest.py: the longest first.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
LLAMACPP := build/llamacpp
LLAMACPP_SOURCE := llama-cpp-python==0.3.36
LLAMACPP_OPTIONS := -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
LLAMACPP_AMX := $(LLAMACPP)/src/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
TRITON_PYTHON ?= /usr/bin/python3
ROS_PYTHON ?= python3.11
ZENOH_PYTHON ?= $(PYTHON)
OLDEST_PINS := numpy==1.24.4 pillow==9.5.0 tokenizers==0.20.0 jinja2==3.1.6

.PHONY: setup demo test test-all fuzz trtrtx test-trtrtx test-oldest test-triton test-ray test-page test-js test-clients test-evals test-ros test-zenoh test-arm64 kill soak soak-serve check accuracy methods real bench llamacpp test-llamacpp scaling scenes reader docs release test-newest test-notebook clean

setup: .venv/.installed  ## make .venv and install vtp into it

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); \
	  sys.exit(0 if ok else f"vtp needs Python 3.11 to 3.13, {sys.executable} is {sys.version.split()[0]}; run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[$(EXTRAS)]'
	touch $@

demo: setup  ## the main job on the built-in model: export with AdaptPrune, ask, show what was kept
	$(BIN)/vtp-export --method adaptprune -o $(DEMO)/bundle --overwrite
	$(BIN)/vtp-run $(DEMO)/bundle --image scenes/examples/scene.png --prompt "what color is the star ?" \
	  --show-kept $(DEMO)/kept.png

test: setup  ## the tests (CPU, no network), a file per process and core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test-all: setup  ## the same and the slow ones (an hour or more)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m "slow or not slow"

# FUZZ=SECONDS or CASES=NUMBER; SEED=N draws other cases; AREAS=bundles,graphs some of them only.
fuzz: setup  ## hostile bundles, graphs, templates, tokenizers, pictures, prompts, options, folders, questions
	$(BIN)/python tests/fuzz/run.py $(if $(FUZZ),--seconds $(FUZZ)) $(if $(CASES),--cases $(CASES)) \
	  $(if $(SEED),--seed $(SEED)) $(if $(AREAS),--areas $(AREAS))

trtrtx: setup  ## install TensorRT-RTX (250 MB, no GPU needed): `make test` then runs its tests, too
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[trtrtx]'

test-trtrtx: trtrtx  ## only what is built with TensorRT-RTX, the long ones included
	$(BIN)/python -m pytest -m trtrtx

test-oldest: setup  ## every method on the oldest versions that the runtime serves, in build/oldest (OLDEST_PYTHON=python3.10 for JetPack 6's)
	test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST_PINS) onnxruntime==1.17.0
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps .
	$(BIN)/python tests/oldest.py export $(OLDEST)/jetpack6 jetpack6
	$(BIN)/python tests/oldest.py export $(OLDEST)/ort ort
	$(BIN)/python tests/oldest.py write $(OLDEST)/jetpack6.json $(OLDEST)/jetpack6
	$(BIN)/python tests/oldest.py write $(OLDEST)/ort.json $(OLDEST)/ort
	$(OLDEST)/bin/python tests/oldest.py compare $(OLDEST)/jetpack6.json
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime==1.23.2
	$(OLDEST)/bin/python tests/oldest.py compare $(OLDEST)/ort.json

test-triton: setup  ## a bundle on the real Triton server of nvidia-pytriton, in build/triton (wants the system's own python3)
	test -x build/triton/bin/python || $(TRITON_PYTHON) -m venv build/triton
	build/triton/bin/python -m pip install --quiet --disable-pip-version-check nvidia-pytriton==0.7.0 \
	  onnxruntime pillow tokenizers jinja2
	build/triton/bin/python -m pip install --quiet --disable-pip-version-check --no-deps .
	$(BIN)/vtp-export --method adaptprune --verify none -o build/triton/bundle --overwrite
	build/triton/bin/python tests/triton_server.py build/triton/bundle

test-ray: setup  ## calibration and vtp-serve on a local Ray, whose workers and replicas are killed, in build/ray
	test -x build/ray/bin/python || $(PYTHON) -m venv build/ray
	build/ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[$(EXTRAS),ray]'
	OMP_NUM_THREADS=1 build/ray/bin/python -m pytest tests/calib/test_ray.py tests/serve/test_ray_serve.py

# CHROMIUM is the browser's path; on Debian `apt-get install chromium` brings it, and Node 20 or later is wanted.
test-page: setup  ## the page of a real vtp-serve in a real Chromium, in build/page: answers, keyboard, phone, camera
	mkdir -p build/page
	test -d build/page/node_modules/playwright-core || npm install --silent --no-audit --no-fund --prefix build/page playwright-core@1.64.1
	$(BIN)/vtp-export --method vispruner --keep-tokens 16,36,64,144 --verify none -o build/page/bundle --overwrite
	$(BIN)/python -m tests.page build/page/bundle build/page build/page/shots

# JS takes names of CASES in tests/js/__main__.py. Node 20 or later; CHROMIUM is the browser's path, as above.
test-js: setup  ## folders of layout transformers.js in the unmodified client, in Node and in Chromium, in build/js
	mkdir -p build/js
	test -d build/js/node_modules/playwright-core || npm install --silent --no-audit --no-fund --ignore-scripts \
	  --prefix build/js @huggingface/transformers@4.3.2 playwright-core@1.64.1
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.js build/js $(JS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.js.browser build/js

# CLIENTS takes names of tests/clients/versions.toml, such as "openai llm"; packages come from PyPI and npm.
test-clients: setup  ## unmodified clients (openai, litellm, ollama, ai, …) ask a real vtp-serve, in build/clients
	$(BIN)/python -m tests.clients $(CLIENTS)

# EVALS takes names: "lmms-eval", "vlmevalkit". Packages come from PyPI (1.5 GB).
test-evals: setup  ## lmms-eval and VLMEvalKit evaluate a bundle by their own commands, in build/evals
	$(BIN)/python -m tests.evals $(EVALS)

# The wheels are for tests only: a robot's own ROS 2 comes with its distribution. ROS_PYTHON must be 3.11, as they are.
test-ros: setup  ## vtp-ros2 against real rclpy over real middleware, in build/ros (260 MB, four processes, ten minutes)
	test -x build/ros/bin/python || $(ROS_PYTHON) -m venv build/ros
	build/ros/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[ort]' \
	  'ros-kilted-rclpy[fastrtps]==9.1.2' ros-kilted-sensor-msgs==5.5.1 ros-kilted-std-msgs==5.5.1 \
	  ros-kilted-std-srvs==5.5.1 ros-kilted-diagnostic-msgs==5.5.1
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/robots -m "slow or not slow"

# ZENOH_PYTHON must be 3.11 to 3.14, and a C compiler there, as pyzeros wants.
test-zenoh: setup  ## vtp-zenoh beside two other makers' clients over a real router, in build/zenoh (300 MB, minutes)
	test -x build/zenoh/bin/python || $(ZENOH_PYTHON) -m venv build/zenoh
	build/zenoh/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) \
	  -e '.[ort,zenoh]' zenoh-ros2-sdk==0.1.8 pyzeros==0.1.0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/robots/test_zenoh.py tests/robots/test_zenoh_keys.py \
	  tests/robots/test_zenoh_node.py -m "slow or not slow"

# ARM64 takes methods, targets, weights, several joined by "-", quick, or commands: ARM64="vispruner jetpack6-int8".
test-arm64: setup  ## bundles on arm64 Python under qemu answer as on x86-64, in build/arm64 (wants qemu-user-static; two hours)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.arm64 $(ARM64)

soak-serve: setup  ## the same of vtp-serve under mixed load: streams, clients that leave, bad input (SOAK=3600)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.server --seconds $(SOAK)

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	.ci/types

kill: setup  ## writers killed 200 times at every border, full disks, readers at once (minutes; KILLS=200)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kill --kills $(KILLS)

soak: setup  ## one process that answers for an hour: memory, descriptors and threads must not grow (SOAK=3600)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --seconds $(SOAK)

# ACCURACY takes flags, such as "--methods none,focal --keep 64".
accuracy: setup  ## exact match on 1,000 held-out questions, as a Markdown table
	$(BIN)/python -m vtp.bench.studies.accuracy $(ACCURACY)

methods: setup  ## every method side by side: docs/measured.md, the plot and the table of docs/methods.md (about an hour)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[$(EXTRAS),bench]'
	$(BIN)/python -m vtp.bench.studies.methods --resume

# MODEL is a hub id or a folder; DATA any of gqa,textvqa,pope. LIMIT=N asks the first N questions, METHODS and KEEP
# choose what is compared, REAL takes more flags, such as "--dtype float16 --engine ort-cuda".
real: setup  ## a real checkpoint on public sets beside the papers' figures (wants a network; hours): build/real, docs/real.md
	@test -n "$(MODEL)" && test -n "$(DATA)" || { echo "give both: make real MODEL=llava-hf/llava-1.5-7b-hf DATA=gqa"; exit 2; }
	$(BIN)/python -m vtp.bench.real --model "$(MODEL)" --data "$(DATA)" $(if $(LIMIT),--limit $(LIMIT)) \
	  $(if $(METHODS),--methods "$(METHODS)") $(if $(KEEP),--keep "$(KEEP)") $(REAL)

# Peers that cannot be installed are named in the page. BENCH takes flags, such as "--int8 --int4 --towers ipcv:0.35", which want
# `make llamacpp` beforehand for llama.cpp to take part.
bench: setup  ## vtp beside its peers on a full-size shape: docs/bench.md and the README's figures (idle; half an hour)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[$(EXTRAS),bench]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[peers]'
	$(BIN)/python -m vtp.bench.compare.peers $(BENCH)

# The sdist of llama-cpp-python holds llama.cpp's whole source; wheels of it lack the machine's own instructions.
llamacpp: setup  ## build llama.cpp, a peer of `make bench`, in build/llamacpp (half an hour on two cores; wants cmake, ninja, g++)
	mkdir -p $(LLAMACPP)/src
	test -e $(LLAMACPP)/src/PKG-INFO || { $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
	  --no-binary llama-cpp-python -d $(LLAMACPP) $(LLAMACPP_SOURCE) && \
	  tar -xzf $(LLAMACPP)/llama_cpp_python-*.tar.gz -C $(LLAMACPP)/src --strip-components 1; }
# Before GCC 13 _tile_loadconfig says that it reads 8 of its 64 bytes, so that what is stored in the others is left
# out, and q8_0 and q4_0 end with SIGILL on CPUs with AMX. A barrier in front of the call keeps all of them.
	grep -q '"r"(&tc)' $(LLAMACPP_AMX) || \
	  sed -i 's/^    _tile_loadconfig(&tc);/    asm volatile("" : : "r"(\&tc) : "memory");\n&/' $(LLAMACPP_AMX)
	cmake -S $(LLAMACPP)/src/vendor/llama.cpp -B $(LLAMACPP)/cmake -G Ninja $(LLAMACPP_OPTIONS)
	cmake --build $(LLAMACPP)/cmake --target llama-server llama-quantize llama-mtmd-cli llama-bench

test-llamacpp: setup  ## llama.cpp on converted tiny models answers as transformers does (wants `make llamacpp`)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[$(EXTRAS),peers]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/bench/test_llamacpp.py

# SCALING takes flags, such as "--rounds 2" or "--quick". A run that was ended goes on where it stood.
scaling: setup  ## what a request costs as it grows: docs/scaling.md, .json and .png (about ten minutes, idle)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[$(EXTRAS),bench]'
	$(BIN)/python -m vtp.bench.scaling.study $(SCALING)

scenes: setup  ## train the built-in model again (about two hours on 2 CPU cores; resumes)
	$(BIN)/python -m vtp.scenes.training.train --run build/scenes

reader: setup  ## train the second built-in model, which reads signs (about two hours on 1 CPU core; resumes)
	$(BIN)/python -m vtp.scenes.training.train --recipe reader --run build/reader

# The site needs none of the packages that vtp runs on: docstrings are read, not imported.
docs:  ## the documentation as a site in build/site, links checked (mkdocs, in build/docs)
	test -x build/docs/bin/python || $(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 build/docs/bin/python -m mkdocs build --strict

# GO=1 commits, tags and fills dist/; without it everything but that is tried in a copy. Nothing is uploaded.
release:  ## build and check the packages of VERSION=0.2.0; with GO=1 make it a release
	test -n "$(VERSION)" || { echo "give a version: make release VERSION=0.2.0" >&2; exit 2; }
	test -x build/release/bin/python || $(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check 'build>=1.2' 'twine>=6.1'
	build/release/bin/python .ci/release.py $(VERSION) $(if $(GO),--go)

# NEWEST takes what pytest takes, or all. TORCH names a build of torch if the index' newest is the one for CUDA:
# "torch --extra-index-url https://download.pytorch.org/whl/cpu", or "torch==2.13.0".
test-newest:  ## the newest versions that the index has, in build/newest: what they are, then tests (NEWEST=all: all)
	test -x build/newest/bin/python || $(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  $(EDITABLE) -e '.[$(EXTRAS)]' $(TORCH)
	build/newest/bin/python tests/newest.py constraints.txt
	OMP_NUM_THREADS=1 build/newest/bin/python -m pytest $(if $(filter all,$(NEWEST)),$(WORKERS),$(or $(NEWEST),$(QUICK)))

test-notebook: setup  ## the notebook as Jupyter runs it, in build/notebook (nbclient)
	test -x build/notebook/bin/python || $(PYTHON) -m venv build/notebook
	build/notebook/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) \
	  -e '.[export,ort]' 'nbclient>=0.10' 'ipykernel>=6.29'
	build/notebook/bin/python tests/packaging/notebook.py

clean:
	rm -rf build .venv
