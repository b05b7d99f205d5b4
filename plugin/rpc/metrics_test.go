package rpc_test

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/rpc"
)

func TestMetrics(t *testing.T) {
	ops := &operation.Table{}
	m := rpc.NewMetrics(ops)
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(m)
	m.Observe("Version", codes.OK, time.Millisecond)
	for range 2 { // of which one is shown
		ctx, op := ops.Begin(context.Background(), operation.Info{Name: "run"})
		defer op.End()
		operation.Stage(ctx, "attach network")
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	for _, f := range families {
		got[f.GetName()] = len(f.GetMetric())
	}
	if got["gantry_cri_request_seconds"] != 1 || got["gantry_oldest_operation_seconds"] != 1 {
		t.Errorf("got %v", got)
	}
}
