# Plain GNU make, one file, no configure step.  `make help` lists the targets.
#   make                 programs, with CUDA when nvcc is found (CUDA=0 leaves it out)
#   make SAN=address,undefined test     any -fsanitize= list; builds in a folder of its own
MODULES   := traces kernels capture sim analyze
PROGRAMS  := kv-trace kv-capture kv-sim kv-analyze
MAIN_kv-trace   := traces/main.c
MAIN_kv-capture := capture/main.c
MAIN_kv-sim     := sim/main.c
MAIN_kv-analyze := analyze/main.c

CC        ?= cc
NVCC      ?= $(shell command -v nvcc 2>/dev/null)
CUDA      ?= $(if $(NVCC),1,0)
CUDA_ARCH ?= 80 90
PREFIX    ?= /usr/local
SAN       ?=
# V=1 shows the commands
say        = $(if $(V),,@echo "  $1";)
comma     := ,
hash      := \#
OUT       := build$(if $(SAN),/san-$(subst $(comma),-,$(SAN)))
OBJ       := $(OUT)/obj$(if $(filter 1,$(CUDA)),-cuda)

WARN      := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wconversion -Wno-sign-conversion
CFLAGS    ?= -O2 -g
KFLAGS    := -std=c11 -I. -I$(OBJ) -D_GNU_SOURCE -ffp-contract=off -fno-math-errno -pthread $(WARN) \
             $(if $(SAN),-fsanitize=$(SAN) -fno-sanitize-recover=all -fno-omit-frame-pointer)
PKGS      := libzstd jansson libpcre2-8 libutf8proc sqlite3 openblas zlib
# The packages may be missing while `make deps` runs, so these are recursive and silent.
PKGCFLAGS  = $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
LIBS       = $(shell pkg-config --libs $(PKGS) 2>/dev/null || echo -lzstd -ljansson -lpcre2-8 -lutf8proc -lsqlite3 -lopenblas -lz) -ldl -lm
KSRC      := $(filter-out kernels/nocuda%,$(wildcard kernels/*.c))
ifeq ($(CUDA),1)
CUDA_HOME ?= $(abspath $(dir $(realpath $(NVCC)))/..)
GENCODE   := $(foreach a,$(CUDA_ARCH),-gencode arch=compute_$a,code=sm_$a) \
             -gencode arch=compute_$(lastword $(CUDA_ARCH)),code=compute_$(lastword $(CUDA_ARCH))
CULIBS    := -L$(CUDA_HOME)/lib64 -lcudart_static -lcublas -lstdc++ -lrt
KSRC      += $(wildcard kernels/*.cu)
else
KSRC      += $(wildcard kernels/nocuda*.c)
endif

MAINS     := $(foreach p,$(PROGRAMS),$(MAIN_$p))
LIBSRC    := $(filter-out $(MAINS),$(foreach m,traces capture sim sim/scorers analyze,$(wildcard $m/*.c))) $(KSRC)
LIB       := $(OBJ)/libkv.a
BINS      := $(PROGRAMS:%=$(OUT)/%)
TESTS     := $(patsubst tests/%.c,$(OUT)/tests/%,$(wildcard tests/test_*.c))
PLUGINS   := $(patsubst sim/plugins/%.c,$(OUT)/plugins/%.so,$(wildcard sim/plugins/*.c)) \
             $(patsubst %.c,$(OUT)/%.so,$(wildcard tests/plugins/*.c))

## all: the programs (default), in build/
all: $(BINS)

# What the build was: commit, compiler, CUDA or not. Rewritten only when it changes.
BUILD_ID  := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$(shell git diff --quiet HEAD -- $(MODULES) 2>/dev/null || echo +) $(shell $(CC) -dumpfullversion -dumpversion 2>/dev/null | head -1 | sed 's/^/cc-/') $(if $(filter 1,$(CUDA)),cuda,cpu)
$(OBJ)/build_id.h: FORCE
	@mkdir -p $(@D); echo '#define KV_BUILD_ID "$(BUILD_ID)"' > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@
$(OBJ)/traces/cli.c.o: $(OBJ)/build_id.h
# Text that programs carry in themselves, as a C string.
EMBED     := $(OBJ)/sim/schema.sql.h $(OBJ)/analyze/page.css.h $(OBJ)/analyze/page.js.h
$(EMBED): $(OBJ)/%.h: %
	@mkdir -p $(@D)
	@sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/^/"/' -e 's/$$/\\n"/' $< > $@
$(OBJ)/sim/results.c.o: $(OBJ)/sim/schema.sql.h
$(OBJ)/analyze/page.c.o: $(OBJ)/analyze/page.css.h $(OBJ)/analyze/page.js.h

$(OBJ)/%.c.o: %.c
	@mkdir -p $(@D)
	$(call say,cc $<)$(CC) $(CFLAGS) $(if $(filter kernels/%,$<),-O3) $(CPPFLAGS) $(KFLAGS) -MMD -MP $(PKGCFLAGS) -c $< -o $@
$(OBJ)/%.cu.o: %.cu
	@mkdir -p $(@D)
	$(call say,nvcc $<)$(NVCC) -O3 -lineinfo -std=c++17 -I. $(GENCODE) $(if $(filter kernels/exact.cu,$<),-fmad=false) -MMD -MP -MF $(@:.o=.d) -Xcompiler -fno-exceptions,-fno-rtti,-Wall -c $< -o $@
# Code for Hopper's own instructions runs on compute capability 9.0 alone; the program picks these kernels there.
$(OBJ)/%_sm90.cu.o: %_sm90.cu
	@mkdir -p $(@D)
	$(call say,nvcc $<)$(NVCC) -O3 -lineinfo -std=c++17 -I. -gencode arch=compute_90a,code=sm_90a -MMD -MP -MF $(@:.o=.d) -Xcompiler -fno-exceptions,-fno-rtti,-Wall -c $< -o $@
$(LIB): $(patsubst %,$(OBJ)/%.o,$(LIBSRC))
	@rm -f $@ && ar rcs $@ $^
define program
$(OUT)/$1: $(OBJ)/$(MAIN_$1).o $(LIB)
	@mkdir -p $$(@D)
	$$(call say,ld $$@)$(CC) $(CFLAGS) $(KFLAGS) $$^ -o $$@ -rdynamic $(LDFLAGS) -Wl,--as-needed $$(LIBS) $(CULIBS)
endef
$(foreach p,$(PROGRAMS),$(eval $(call program,$p)))
$(OUT)/tests/%: $(OBJ)/tests/%.c.o $(LIB)
	@mkdir -p $(@D)
	$(call say,ld $@)$(CC) $(CFLAGS) $(KFLAGS) $(filter %.o,$^) $(LIB) -o $@ -rdynamic $(LDFLAGS) -Wl,--as-needed $(LIBS) $(CULIBS)
$(OUT)/tests/%: $(OBJ)/tests/%.cu.o $(LIB)
	@mkdir -p $(@D)
	$(call say,ld $@)$(CC) $(CFLAGS) $(KFLAGS) $^ -o $@ $(LDFLAGS) -Wl,--as-needed $(LIBS) $(CULIBS)
# The saved inputs of the fuzzers are a test like any other.
FUZZSRC   := $(filter-out tests/fuzz/fuzzer.c,$(wildcard tests/fuzz/*.c))
$(OUT)/tests/test_fuzz: $(patsubst %,$(OBJ)/%.o,$(FUZZSRC))
# Calls that fail, to preload (tests/faults.py); a sanitizer has its own malloc.
ifeq ($(SAN),)
PLUGINS   += $(OUT)/tests/fault.so
endif
$(OUT)/tests/fault.so: tests/fault.c
	$(call say,so $@)mkdir -p $(@D) && $(CC) $(CFLAGS) -std=c11 -D_GNU_SOURCE -shared -fPIC $(WARN) $< -o $@ -ldl
# A kernel that traps, to preload (tests/gpu_check.py).
$(OUT)/tests/trap.so: tests/trap.cu
	$(call say,nvcc $@)mkdir -p $(@D) && $(NVCC) -O2 -std=c++17 $(GENCODE) -shared -Xcompiler -fPIC,-Wall -Xlinker --exclude-libs,ALL $< -o $@ -ldl
# Plug-ins are built as a stranger builds them: the public header and nothing else.
PLUGIN     = $(call say,so $@)mkdir -p $(@D) && $(CC) $(CFLAGS) -std=c11 -shared -fPIC -ffp-contract=off $(WARN) \
             $(filter -fsanitize=%,$(KFLAGS)) -Isim $< -o $@ -lm
$(OUT)/plugins/%.so: sim/plugins/%.c sim/kvtrace_policy.h
	$(PLUGIN)
$(OUT)/tests/plugins/%.so: tests/plugins/%.c sim/kvtrace_policy.h
	$(PLUGIN)

# ---------------------------------------------------------------------------------------------------- packages
DEB_BUILD := gcc libc6-dev pkg-config libzstd-dev libsqlite3-dev libopenblas-dev libjansson-dev libpcre2-dev libutf8proc-dev zlib1g-dev gnuplot-nox
DEB_MODEL := python3 python3-pip ca-certificates
DEB_TEST  := zstd python3-numpy python3-zstandard
# $(call install,packages): install what is missing, or print the command and stop.
install_cmd = sh tests/deps.sh $1

## deps: install the Debian packages that are missing (as root or through sudo; else prints the command)
deps:
	@$(call install_cmd,$(DEB_BUILD))
## model: fetch SmolLM2-135M-Instruct (98 MB, Apache-2.0) into build/models/
model:
	@$(call install_cmd,$(DEB_MODEL))
	@sh capture/get-model.sh build/models
## demo: model -> traces -> replay -> results.db -> figures in build/demo, in a few minutes on two cores
demo: deps
	@$(MAKE) --no-print-directory -j$$(nproc) all
	@$(call install_cmd,$(DEB_MODEL)) || echo "demo: goes on without pip"
	@sh analyze/demo.sh build build/demo
## test: units, goldens, command line; installs what it needs; GPU tests are skipped without a GPU
test:
	@$(call install_cmd,$(DEB_BUILD) $(DEB_TEST))
	@$(MAKE) --no-print-directory -j$$(nproc) all tests
	@{ $(call install_cmd,$(DEB_MODEL)) && sh capture/get-model.sh build/models; } || echo "test: goes on without the real model; its tests are skipped"
	@sh tests/run.sh $(OUT)
tests: $(TESTS) $(PLUGINS)
## faults: the n-th call fails, kill -9 at 200 moments, every bit flipped, 1,000 traces, a real Slurm: tests/README.md; hours
faults: all $(PLUGINS) $(OUT)/tests/test_corrupt
	python3 tests/faults.py $(OUT)
	python3 tests/kills.py $(OUT) --moments 200
	$(OUT)/tests/test_corrupt all
	python3 tests/sweep.py $(OUT) --traces 1000
	sh tests/slurm.sh $(OUT)
## bench: timings as CSV, one row per thing measured (needs `make model`)
bench: all $(OUT)/tests/bench_kernels $(OUT)/tests/bench_path $(OUT)/tests/bench_replay
	@sh tests/bench.sh $(OUT)
## test-gpu: what needs a CUDA device: kernels against their definitions, captures; counts as skipped without one
test-gpu: all $(OUT)/tests/test_kernels $(OUT)/tests/test_cuda $(OUT)/tests/test_cuda_replay $(if $(filter 1,$(CUDA)),$(OUT)/tests/trap.so)
	$(OUT)/tests/test_kernels
	$(OUT)/tests/test_cuda
	$(OUT)/tests/test_cuda_replay
	python3 tests/gpu_check.py $(OUT) $(or $(wildcard ../shared/golden/models),tests/golden/models) build/models/SmolLM2-135M-Instruct.Q4_1.gguf
## bench-gpu: rates of the device kernels beside cuBLAS and, where python3 has torch, its fused attention
bench-gpu: $(OUT)/tests/bench_attention
	@$(OUT)/tests/bench_attention
	@python3 tests/bench_sdpa.py
## bench-capture: recording on against off for the 8B shape, beside Hugging Face's prefill where python3 has transformers
bench-capture: $(OUT)/tests/bench_capture
	@for n in 8192 32768 131072; do $(OUT)/tests/bench_capture synthetic:llama-8b $$n || exit 1; python3 tests/bench_hf.py $$n; done
## bench-replay: 8 policies x 16 budgets on the GPU, from a capture of the 8B shape at 32,768 + 64 tokens (4.3 GB in build/)
bench-replay: $(OUT)/kv-capture $(OUT)/tests/bench_replay_gpu
	@[ -f $(OUT)/bench-8b.kvt ] || $(OUT)/kv-capture run -m synthetic:llama-8b --tokens random:32832 --prompt-tokens 32768 --record obs --wo embed -o $(OUT)/bench-8b.kvt
	@$(OUT)/tests/bench_replay_gpu $(OUT)/bench-8b.kvt
## bench-decode: decode attention at the kept length against the full cache, as a ratio in one run
bench-decode: $(OUT)/tests/bench_decode
	@$(OUT)/tests/bench_decode

# ---------------------------------------------------------------------------------------------------- fuzzing
FUZZ      ?= gguf
TIME      ?= 60
FUZZ_OUT  := build/fuzz
FUZZ_RUN  := -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=1024 -max_len=65536 -print_final_stats=1
FUZZ_SAN  := address,undefined
## fuzz: FUZZ=name [TIME=seconds]: one target of tests/fuzz/fuzz.h under libFuzzer (clang); new inputs in build/fuzz/NAME
fuzz:
	@$(call install_cmd,$(DEB_BUILD) clang)
	@$(MAKE) --no-print-directory CC=clang CUDA=0 CFLAGS='-O1 -g' SAN=fuzzer-no-link,$(FUZZ_SAN) OUT=$(FUZZ_OUT) $(FUZZ_OUT)/fuzz_$(FUZZ)
	@mkdir -p $(FUZZ_OUT)/$(FUZZ)
	OPENBLAS_NUM_THREADS=1 $(FUZZ_OUT)/fuzz_$(FUZZ) $(FUZZ_RUN) -max_total_time=$(TIME) -artifact_prefix=$(FUZZ_OUT)/ $(FUZZ_OUT)/$(FUZZ) tests/fuzz/corpus/$(FUZZ)
$(FUZZ_OUT)/fuzz_%: tests/fuzz/fuzzer.c $(patsubst %,$(OBJ)/%.o,$(FUZZSRC)) $(LIB)
	$(call say,ld $@)$(CC) $(CFLAGS) $(KFLAGS) -DTARGET=fuzz_$* $(PKGCFLAGS) $^ -o $@ -fsanitize=fuzzer,$(FUZZ_SAN) $(LDFLAGS) -Wl,--as-needed $(LIBS)

# ---------------------------------------------------------------------------------------------------- checks
SRCS      = $(wildcard $(MODULES:%=%/*.[ch]) sim/scorers/*.c sim/plugins/*.c tests/*.[ch] tests/fuzz/*.[ch] tests/plugins/*.c)
LINTFLAGS = $(KFLAGS) -Isim $(PKGCFLAGS) -fsyntax-only -Werror
## check-all: make test, warnings as errors, lint, sanitizers on what meets memory, threads and files of others (.ci/run)
check-all:
	@sh tests/check-all.sh
## lint: include arrows, each header alone, warnings as errors in gcc and clang, formatting
lint: $(OBJ)/build_id.h $(EMBED)
	sh tests/arrows.sh
	for h in $(filter %.h,$(SRCS)); do gcc $(LINTFLAGS) -Wno-unused-function -Wno-unused-variable -x c $$h || exit 1; done
	for cc in gcc clang; do $$cc $(LINTFLAGS) $(filter %.c,$(SRCS)) || exit 1; done
	clang-format --dry-run -Werror $(SRCS)
## format: rewrite the sources with clang-format
format:
	clang-format -i $(SRCS)
## install: programs, figures and the plug-in header under $(PREFIX) (honours DESTDIR)
install: all
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/kvtrace/plots
	install -m 755 $(BINS) $(DESTDIR)$(PREFIX)/bin
	install -m 644 plots/*.sql plots/*.gp $(DESTDIR)$(PREFIX)/share/kvtrace/plots
	install -m 644 -D sim/kvtrace_policy.h $(DESTDIR)$(PREFIX)/include/kvtrace_policy.h
## clean: remove what was built (the fetched model stays in build/models)
clean:
	find build -mindepth 1 -maxdepth 1 ! -name models -exec rm -rf {} +
## help: this list
help:
	@sed -n 's/^## //p' Makefile | awk -F': ' '{printf "  %-9s %s\n", $$1, $$2}'
	@echo "  now: CC=$(CC) CUDA=$(CUDA) SAN=$(SAN) output in $(OUT)/"

FORCE:
.PHONY: all deps model demo test tests faults fuzz check-all test-gpu bench bench-gpu bench-capture bench-decode bench-replay lint format install clean help FORCE
.SECONDARY:
-include $(shell find $(OBJ) -name '*.d' 2>/dev/null)
