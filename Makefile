# gantry. `make help` lists the targets. Everything is incremental: go build
# looks at its own cache, the pinned parts are rebuilt when their pin changes.

SHELL         := /bin/bash
.SHELLFLAGS   := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build

VERSION       ?= 0.1.0
CONTAINERD    := $(shell sed -n 's,^\tgithub.com/containerd/containerd/v2 v,,p' go.mod)
REVISION      := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
# Inputs, not seconds: the end of a timed run can fail by itself (golang/go#75804).
FUZZTIME      ?= 10000x
TEST_TIMEOUT  ?= 40m
RUN           ?=
# Tests against a daemon wait more than they work.
PARALLEL      ?= $(shell echo $$(($$(nproc) + 1)))
OUT           := out

CTRD_VERSION  := github.com/containerd/containerd/v2/version
LDFLAGS       := -s -w \
	-X $(CTRD_VERSION).Version=$(CONTAINERD)+gantry.$(VERSION) \
	-X $(CTRD_VERSION).Revision=$(REVISION) \
	-X $(CTRD_VERSION).Package=github.com/gantry-cri/gantry
GOFLAGS_BUILD := -trimpath

# A command is built as soon as it has Go files.
COMMANDS      := $(foreach d,$(wildcard cmd/*),$(if $(wildcard $(d)/*.go),$(notdir $(d))))
# What runs during a test; RACE=1 has it built with the race detector, which
# makes the whole a third slower or more.
RACED         := $(filter-out gantry,$(COMMANDS))
CNI           := bridge host-local loopback portmap firewall bandwidth tuning ptp
CNI_PKG       := github.com/containernetworking/plugins/plugins
CNI_VERSION    = github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=$(shell sed -n "s,.*containernetworking/plugins \\(v[^ ]*\\).*,\\1,p" tools/cni/go.mod)
cni_path       = $(if $(filter host-local,$(1)),ipam,$(if $(filter bridge loopback ptp,$(1)),main,meta))/$(1)

UNIT_PKGS      = $$(go list ./... | grep -v /integration/) ./integration/bench
INTEGRATION_PKGS = $$(go list ./integration/... | grep -v /integration/bench)

##@ Building

.PHONY: build
build: commands pinned ## bin/: the daemon, our commands, runc, the runc shim, ctr, CNI plugins

# The shim and the snapshotter are static: they start in whatever mount
# namespace they are called from.
.PHONY: commands
commands: generated
	@mkdir -p bin
	@for c in $(COMMANDS); do \
		cgo=0; if [ $$c = containerd ]; then cgo=1; fi; \
		CGO_ENABLED=$$cgo go build $(GOFLAGS_BUILD) -ldflags '$(LDFLAGS)' -o bin/$$c ./cmd/$$c; \
	done
	@ln -sf containerd-shim-gantry-v2 bin/containerd-shim-gantry-pod-v2

.PHONY: pinned
pinned: bin/runc bin/ctr bin/containerd-shim-runc-v2 $(CNI:%=bin/cni/%)

bin/runc: tools/runc/go.mod tools/runc/go.sum
	@mkdir -p $(@D)
	go build -C tools/runc $(GOFLAGS_BUILD) -tags seccomp -ldflags '-s -w' -o $(CURDIR)/$@ github.com/opencontainers/runc

bin/ctr bin/containerd-shim-runc-v2: tools/stock/go.mod tools/stock/go.sum
	@mkdir -p $(@D)
	CGO_ENABLED=0 go build -C tools/stock $(GOFLAGS_BUILD) -ldflags '-s -w -X $(CTRD_VERSION).Version=$(CONTAINERD)' -o $(CURDIR)/$@ github.com/containerd/containerd/v2/cmd/$(@F)

bin/shim1/containerd-shim-runc-v2: tools/shim1/go.mod tools/shim1/go.sum
	@mkdir -p $(@D)
	CGO_ENABLED=0 go build -C tools/shim1 $(GOFLAGS_BUILD) -ldflags '-s -w' -o $(CURDIR)/$@ github.com/containerd/containerd/cmd/$(@F)

bin/gvisor/runsc: tools/gvisor/go.mod tools/gvisor/go.sum scripts/build-gvisor
	scripts/build-gvisor $(@D)

bin/stock/containerd: tools/stock/go.mod tools/stock/go.sum
	@mkdir -p $(@D)
	go build -C tools/stock $(GOFLAGS_BUILD) -ldflags '-s -w -X $(CTRD_VERSION).Version=$(CONTAINERD)' -o $(CURDIR)/$@ github.com/containerd/containerd/v2/cmd/containerd

$(CNI:%=bin/cni/%): bin/cni/%: tools/cni/go.mod tools/cni/go.sum
	@mkdir -p $(@D)
	CGO_ENABLED=0 go build -C tools/cni $(GOFLAGS_BUILD) -ldflags '-s -w -X $(CNI_VERSION)' -o $(CURDIR)/$@ $(CNI_PKG)/$(call cni_path,$*)

.PHONY: stock
stock: bin/stock/containerd ## bin/stock/: containerd of the same release with its own CRI service

.PHONY: others
others: bin/shim1/containerd-shim-runc-v2 bin/gvisor/runsc bin/stock/containerd ## what the tests have beside ours: an older shim, gVisor, stock containerd

.PHONY: race
race: generated ## bin/race/: what the tests run with RACE=1
	@mkdir -p bin/race
	@for c in $(RACED); do go build $(GOFLAGS_BUILD) -race -ldflags '$(LDFLAGS)' -o bin/race/$$c ./cmd/$$c; done
	@ln -sf containerd-shim-gantry-v2 bin/race/containerd-shim-gantry-pod-v2

# What the sources embed.
PAUSE         := plugin/pause
KEEPER        := plugin/stdio/keeper
ANCHOR        := shim/anchor
.PHONY: generated
generated: $(PAUSE)/bin/pause $(KEEPER)/bin/keeper $(ANCHOR)/bin/anchor
$(PAUSE)/bin/pause: $(PAUSE)/build.sh $(PAUSE)/pause.c
	@sh $(PAUSE)/build.sh
	@touch $@
$(KEEPER)/bin/keeper: $(KEEPER)/build.sh $(KEEPER)/keeper.c
	@sh $(KEEPER)/build.sh
	@touch $@
$(ANCHOR)/bin/anchor: $(ANCHOR)/build.sh $(ANCHOR)/anchor.c
	@sh $(ANCHOR)/build.sh
	@touch $@

##@ Running

.PHONY: demo
demo: deps build ## the main job once, start to end, on a bare Debian machine (root)
	@go run ./tools/demo

.PHONY: run
run: build ## the daemon in the foreground under ./run, for crictl or a kubelet (root)
	@exec scripts/run

##@ Testing

.PHONY: test
test: deps ## all tests (root for all of it)
	@rm -rf $(OUT)
	@rc=0; $(MAKE) --no-print-directory unit || rc=1; \
	$(MAKE) --no-print-directory integration || rc=1; exit $$rc

.PHONY: unit
unit: generated ## tests that need no daemon, with the race detector; RUN=regexp picks some
	@mkdir -p $(OUT) && rm -f $(OUT)/unit.jsonl
	go run ./tools/testrun -o $(OUT)/unit.jsonl -- -race -timeout $(TEST_TIMEOUT) $(if $(RUN),-run '$(RUN)') $(UNIT_PKGS)

INTEGRATION := $(if $(STOCK),stock/$(or $(HANDLER),default),$(if $(RACE),race,integration)$(if $(HANDLER),-$(HANDLER)))
# Stock containerd does not do much of what the tests wait for.
PATIENCE    ?= $(if $(STOCK),0.33,$(GANTRY_PATIENCE))
.PHONY: integration
integration: commands $(if $(RACE),race) pinned others ## tests against a real daemon; RUN=regexp picks some, RACE=1 finds data races, HANDLER=runc has pods run by containerd's shim (root)
	@mkdir -p $(dir $(OUT)/$(INTEGRATION)) && rm -f $(OUT)/$(INTEGRATION).jsonl
	GANTRY_STOCK=$(STOCK) GANTRY_HANDLER=$(HANDLER) GANTRY_PATIENCE=$(PATIENCE) GANTRY_BIN=$(if $(RACE),$(CURDIR)/bin/race:)$(CURDIR)/bin go run ./tools/testrun -o $(OUT)/$(INTEGRATION).jsonl -- \
		$(if $(RACE),-race) -count=1 -p 1 -parallel $(PARALLEL) -timeout $(TEST_TIMEOUT) $(if $(RUN),-run '$(RUN)') $(INTEGRATION_PKGS)

# What says something about a shim; the rest of the suite is about the daemon. Many of these
# fail in part with runc's shim too: stock containerd has not all that we have.
STOCK_RUN      ?= ^Test(RPC_0[2-59]|RPC_1.|RPC_2[0-6]|POD|CTR|SEC|MNT|RES|STR|LOG|RTH|STA)_
STOCK_HANDLERS := runc gantry pinned
.PHONY: stock-test
stock-test: bin/stock/containerd ## our shim under stock containerd, with pause processes and without: what passes there with runc's has to pass (root)
	@mkdir -p $(OUT)/stock
	for handler in $(STOCK_HANDLERS); do \
		$(MAKE) --no-print-directory integration STOCK=1 HANDLER=$$handler RUN='$(or $(RUN),$(STOCK_RUN))' >$(OUT)/stock/$$handler.log || :; \
	done
	go run ./tools/pairing -excused integration/lifecycle/stock.tsv $(STOCK_HANDLERS:%=$(OUT)/stock/%.jsonl)

# Not race-built: the emulation is slow enough. VM_RUN is what make vm-test runs
# unless RUN says otherwise.
VM_RUN        ?= RTH_12_AnchorReaps|RTH_14_OwnUnit|RTH_12_Terminal|RES_19|POD_09|RES_0[89]|RES_11_H|RES_1[3456]|RES_20|RES_3[012]|LIF_13|AppArmor|CTR_28|MNT_23
# What it runs once more on control groups of version 1.
VM_V1_RUN     ?= RES_1[46]|CTR_28|RTH_14_OwnUnit
VM_V1_KERNEL   = systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1
# And with SELinux in place of AppArmor.
VM_SELINUX_RUN ?= POD_18_L|MNT_07|SEC_21_L|SEC_2[2-5]_|CTR_28_SEL
VM_SELINUX_KERNEL = security=selinux
VM_TIMEOUT    ?= 30m
VM_TEST        = GANTRY_BIN=$(CURDIR)/bin GANTRY_VM=$(CURDIR)/bin/vm GANTRY_PATIENCE=8 go run ./tools/testrun
VM_FLAGS       = -exec $(CURDIR)/bin/vmexec -count=1 -v -parallel 4 -timeout $(VM_TIMEOUT)
.PHONY: vm-test
vm-test: commands pinned bin/vmexec vm ## tests that need systemd, cgroup v2, AppArmor or SELinux, in a virtual machine; RUN=regexp picks some (root)
	@mkdir -p $(OUT) && rm -f $(OUT)/vm*.jsonl
	@rc=0; $(VM_TEST) -o $(OUT)/vm.jsonl -- $(VM_FLAGS) -run '$(or $(RUN),$(VM_RUN))' ./integration/lifecycle || rc=1; \
	GANTRY_VM_KERNEL='$(VM_V1_KERNEL)' $(VM_TEST) -o $(OUT)/vm-v1.jsonl -- $(VM_FLAGS) -run '$(or $(RUN),$(VM_V1_RUN))' ./integration/lifecycle || rc=1; \
	GANTRY_VM_KERNEL='$(VM_SELINUX_KERNEL)' $(VM_TEST) -o $(OUT)/vm-selinux.jsonl -- $(VM_FLAGS) -run '$(or $(RUN),$(VM_SELINUX_RUN))' ./integration/lifecycle || rc=1; exit $$rc

.PHONY: vm
vm:
	@scripts/install-deps --vm
	@scripts/vm-image bin/vm

.PHONY: bin/vmexec
bin/vmexec:
	@mkdir -p $(@D)
	CGO_ENABLED=0 go build $(GOFLAGS_BUILD) -o $@ ./tools/vmexec

.PHONY: fault
fault: race pinned ## crashes and stalls, the long way: 500 random kill -9 of the daemon, and 500 of the daemon, the supervisor or both (root)
	@mkdir -p $(OUT) && rm -f $(OUT)/fault.jsonl
	GANTRY_BIN=$(CURDIR)/bin/race:$(CURDIR)/bin GANTRY_FAULT_LONG=500 go run ./tools/testrun -o $(OUT)/fault.jsonl -- \
		-race -count=1 -v -timeout 2h -run 'LIF_|RTH_1|LOG_09|POD_02' ./integration/lifecycle

.PHONY: fuzz
fuzz: generated ## every fuzz target for FUZZTIME (10000x)
	@scripts/fuzz $(FUZZTIME)

.PHONY: bench
bench: build bin/stock/containerd ## against stock containerd on this machine, into docs/benchmarks.md (root)
	GANTRY_BIN=$(CURDIR)/bin go run ./integration/bench -o docs/benchmarks.md

.PHONY: bench-crun
bench-crun: build bin/stock/containerd ## the same with crun, into docs/benchmarks-crun.md (root)
	GANTRY_BIN=$(CURDIR)/bin scripts/without-hybrid go run ./integration/bench -subjects stock:runc,gantry:crun -only lifecycle,density -o docs/benchmarks-crun.md

##@ Checking

.PHONY: check
check: generated ## format, vet, static analysis, house rules, dependency direction
	@scripts/check

.PHONY: features
features: ## writes docs/features.md from the inventory and the last test runs
	@go run ./tools/features -inventory docs/inventory.tsv -partial docs/partial.tsv -o docs/features.md $(OUT)

.PHONY: features-check
features-check: ## fails when docs/features.md is not what the last test runs prove; VM=required wants that of vm-test too
	@go run ./tools/features -inventory docs/inventory.tsv -partial docs/partial.tsv $(if $(VM),-vm) -check docs/features.md $(OUT)

##@ Else

.PHONY: deps
deps: ## installs the Debian packages that are missing (root when any is)
	@scripts/install-deps

.PHONY: clean
clean: ## removes what was built and what tests wrote
	rm -rf bin $(OUT)

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
