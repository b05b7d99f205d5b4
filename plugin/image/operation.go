package image

import (
	"context"
	"sync"

	"github.com/gantry-cri/gantry/plugin/operation"
)

// Stages of a pull, as they appear in errors and in the operations table.
const (
	stageResolve = "resolve"
	stageFetch   = "fetch"
	stageUnpack  = "unpack"
	stageTag     = "tag"
)

// operations holds what is known about running pulls, for all callers that
// share one. The zero value is ready to use.
type operations struct {
	mu  sync.Mutex
	ops map[pullKey]*running
}

// running is one pull. All fields are guarded by operations.mu.
type running struct {
	stage   string
	active  bool
	callers map[int]func(string) // tell the callers' own operations
	next    int
}

func (o *operations) get(key pullKey) *running {
	op, ok := o.ops[key]
	if !ok {
		op = &running{callers: map[int]func(string){}}
		if o.ops == nil {
			o.ops = map[pullKey]*running{}
		}
		o.ops[key] = op
	}
	return op
}

func (o *operations) settle(key pullKey, op *running) {
	if !op.active && len(op.callers) == 0 {
		delete(o.ops, key)
	}
}

// join registers a caller, whose own operation shows the stages of the pull
// from now on. The function it returns takes the caller out and tells the
// stage the pull is in.
func (o *operations) join(ctx context.Context, key pullKey) (leave func() string) {
	report := func(stage string) { operation.Stage(ctx, stage) }
	o.mu.Lock()
	defer o.mu.Unlock()
	op := o.get(key)
	id := op.next
	op.next++
	op.callers[id] = report
	if op.stage != "" {
		report(op.stage)
	}
	return func() string {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(op.callers, id)
		o.settle(key, op)
		return op.stage
	}
}

// begin marks the pull as running. set moves it to a stage and current tells
// it; end ends it.
func (o *operations) begin(key pullKey) (set func(string), current func() string, end func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	op := o.get(key)
	op.active = true
	set = func(stage string) {
		o.mu.Lock()
		defer o.mu.Unlock()
		if op.stage == stage {
			return
		}
		op.stage = stage
		for _, report := range op.callers {
			report(stage)
		}
	}
	current = func() string {
		o.mu.Lock()
		defer o.mu.Unlock()
		return op.stage
	}
	end = func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		op.active = false
		o.settle(key, op)
	}
	return set, current, end
}
