package operation_test

import (
	"context"
	"strings"
	"testing"

	"github.com/gantry-cri/gantry/plugin/operation"
)

func TestTable(t *testing.T) {
	var table operation.Table
	ctx, op := table.Begin(context.Background(), operation.Info{Name: "RunPodSandbox", Object: "pod a/b"})
	_, inner := table.Begin(ctx, operation.Info{Name: "PullImage", Object: "image x"})
	op.SetID("1234")
	operation.Stage(ctx, "attach network")
	list := table.List()
	if len(list) != 2 || list[0].Name != "RunPodSandbox" || list[0].ID != "1234" || list[0].Stage != "attach network" || list[1].Stage != "" {
		t.Fatalf("got %+v", list)
	}
	e, ok := table.Find("RunPodSandbox", "pod a/b")
	if !ok || !strings.Contains(e.String(), `at "attach network"`) {
		t.Errorf("found %v %v", e, ok)
	}
	op.End()
	inner.End()
	op.End()
	if list := table.List(); len(list) != 0 {
		t.Errorf("after End: %+v", list)
	}
	operation.Stage(context.Background(), "belongs to nothing")
	operation.From(context.Background()).End()
}
