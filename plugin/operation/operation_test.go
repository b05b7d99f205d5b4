package operation_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
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

func TestHandler(t *testing.T) {
	var table operation.Table
	ctx, op := table.Begin(context.Background(), operation.Info{Name: "run", Object: "pod a/b", ID: "1"})
	defer op.End()
	operation.Stage(ctx, "attach network")
	server := httptest.NewServer(table.Handler())
	defer server.Close()
	get := func(path string) string {
		resp, err := http.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s %v", path, resp.Status, err)
		}
		return string(b)
	}
	var list []operation.Entry
	if err := json.Unmarshal([]byte(get("/operations")), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Name != "run" || list[0].Object != "pod a/b" || list[0].ID != "1" || list[0].Stage != "attach network" {
		t.Errorf("got %+v", list)
	}
	if s := get("/stacks"); !strings.Contains(s, "TestHandler") {
		t.Errorf("no stack of this test in\n%s", s)
	}
}
