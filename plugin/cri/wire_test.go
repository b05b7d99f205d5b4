package cri

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// A listing of encoded items is what one of the items is.
func TestWire(t *testing.T) {
	pods := pods(3)
	var items wireItems[podVersion]
	for range 2 {
		for i := range pods {
			want := &cri.ListPodSandboxResponse{}
			var wires [][]byte
			for _, sb := range pods {
				want.Items = append(want.Items, sandboxItem(sb))
				wires = append(wires, encode(t, &items, sb))
			}
			resp, got := &cri.ListPodSandboxResponse{}, &cri.ListPodSandboxResponse{}
			setWire(resp, items.join(wires))
			sent, err := proto.Marshal(resp)
			if err != nil {
				t.Fatal(err)
			}
			if err := proto.Unmarshal(sent, got); err != nil || !proto.Equal(got, want) {
				t.Errorf("%v: %v, want %v", err, got, want)
			}
			pods[i].Phase = record.NotReady
		}
		pods[0].Config = &cri.PodSandboxConfig{Labels: map[string]string{"is": "new"}}
	}
}

func TestWireJoin(t *testing.T) {
	var items wireItems[podVersion]
	a, b := []byte("a"), []byte("bb")
	for _, parts := range [][][]byte{{a, b}, {a, b}, {a}, {b, a}, {a, b, a}, {}, nil, {b}} {
		before := items.last
		want := slices.Concat(parts...)
		got := items.join(parts)
		if !bytes.Equal(got, want) {
			t.Errorf("%q gives %q", parts, got)
		}
		if bytes.Equal(before, want) && len(want) > 0 && &before[0] != &got[0] {
			t.Errorf("%q was joined anew", parts)
		}
	}
}

func TestWireTrim(t *testing.T) {
	var items wireItems[podVersion]
	for _, sb := range pods(spare + 10) {
		encode(t, &items, sb)
	}
	if items.trim(5); len(items.by) != spare+10 {
		t.Errorf("%d are kept of %d", len(items.by), spare+10)
	}
	if items.trim(4); len(items.by) != 0 {
		t.Errorf("%d are kept", len(items.by))
	}
}

func encode(t *testing.T, items *wireItems[podVersion], sb record.Sandbox) []byte {
	t.Helper()
	wire, err := items.of(sb.ID, podVersion{sb.Config, sandboxState(sb)}, func() proto.Message { return sandboxItem(sb) })
	if err != nil {
		t.Fatal(err)
	}
	return wire
}

func pods(n int) []record.Sandbox {
	var all []record.Sandbox
	for i := range n {
		all = append(all, record.Sandbox{ID: fmt.Sprint(i), Phase: record.Ready, CreatedAt: time.Unix(int64(i), 0), Config: &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{Name: fmt.Sprint("pod-", i), Namespace: "test"}, Labels: map[string]string{"n": fmt.Sprint(i)},
		}})
	}
	return all
}
