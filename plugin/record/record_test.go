package record_test

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/store/storetest"
)

// Every pair of phase and event has one known outcome.
func TestPhases(t *testing.T) {
	const no = record.Phase("")
	for _, c := range []struct{ from, started, stopped record.Phase }{
		{record.Creating, record.Ready, record.NotReady},
		{record.Ready, no, record.NotReady},
		{record.NotReady, no, record.NotReady},
		{"unknown", no, no},
	} {
		for e, want := range map[record.Event]record.Phase{record.Started: c.started, record.Stopped: c.stopped, "bogus": no} {
			got, err := c.from.Next(e)
			if want == no && (!errdefs.IsFailedPrecondition(err) || got != c.from) {
				t.Errorf("%s + %s: %s, %v, want refusal", c.from, e, got, err)
			}
			if want != no && (err != nil || got != want) {
				t.Errorf("%s + %s: %s, %v, want %s", c.from, e, got, err, want)
			}
		}
	}
}

func TestContainerPhases(t *testing.T) {
	const no = record.ContainerPhase("")
	for _, c := range []struct{ from, prepared, released, takenBack, exited record.ContainerPhase }{
		{record.ContainerCreating, record.ContainerCreated, no, no, record.ContainerExited},
		{record.ContainerCreated, no, record.ContainerRunning, no, record.ContainerExited},
		{record.ContainerRunning, no, record.ContainerRunning, record.ContainerCreated, record.ContainerExited},
		{record.ContainerExited, no, no, no, record.ContainerExited},
		{"unknown", no, no, no, no},
	} {
		for e, want := range map[record.ContainerEvent]record.ContainerPhase{
			record.Prepared: c.prepared, record.Released: c.released, record.TakenBack: c.takenBack, record.Exited: c.exited, "bogus": no,
		} {
			got, err := c.from.Next(e)
			if want == no && (!errdefs.IsFailedPrecondition(err) || got != c.from) {
				t.Errorf("%s + %s: %s, %v, want refusal", c.from, e, got, err)
			}
			if want != no && (err != nil || got != want) {
				t.Errorf("%s + %s: %s, %v, want %s", c.from, e, got, err, want)
			}
		}
	}
}

func TestUnmarshalRefuses(t *testing.T) {
	good, err := storetest.Sandbox("p", 0).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(map[string]any){
		"no version":     func(m map[string]any) { delete(m, "Version") },
		"later version":  func(m map[string]any) { m["Version"] = 2 },
		"no config":      func(m map[string]any) { delete(m, "Config") },
		"broken config":  func(m map[string]any) { m["Config"] = "/////w==" },
		"path as ID":     func(m map[string]any) { m["ID"] = "../../etc" },
		"upper-case ID":  func(m map[string]any) { m["ID"] = string(bytes.ToUpper([]byte(m["ID"].(string)))) + "" },
		"unknown phase":  func(m map[string]any) { m["Phase"] = "asleep" },
		"number as name": func(m map[string]any) { m["Handler"] = 5 },
	} {
		t.Run(name, func(t *testing.T) {
			m := map[string]any{}
			if err := json.Unmarshal(good, &m); err != nil {
				t.Fatal(err)
			}
			if name == "upper-case ID" {
				m["ID"] = "A" + m["ID"].(string)[1:]
			}
			change(m)
			b, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := record.UnmarshalSandbox(b); !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %v, want InvalidArgument", err)
			}
		})
	}
}

// Whatever is accepted has the parts every record has, and is stable.
func FuzzUnmarshalSandbox(f *testing.F) {
	b, err := storetest.Sandbox("p", 0).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := record.UnmarshalSandbox(b)
		if err != nil {
			return
		}
		if s.Config == nil || !record.ValidID(s.ID) {
			t.Fatalf("accepted without config or ID: %+v", s)
		}
		again, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		s2, err := record.UnmarshalSandbox(again)
		if err != nil {
			t.Fatal(err)
		}
		storetest.EqualSandbox(t, s2, s)
	})
}

func FuzzUnmarshalContainer(f *testing.F) {
	b, err := storetest.Container(record.NewID(), "c", 0).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := record.UnmarshalContainer(b)
		if err != nil {
			return
		}
		if c.Config == nil || !record.ValidID(c.ID) || c.SandboxID == "" {
			t.Fatalf("accepted without config or ID: %+v", c)
		}
		again, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		c2, err := record.UnmarshalContainer(again)
		if err != nil {
			t.Fatal(err)
		}
		storetest.EqualContainer(t, c2, c)
	})
}

func TestUserNS(t *testing.T) {
	sandbox := func(u *cri.UserNamespace) record.Sandbox {
		return record.Sandbox{Config: &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{UsernsOptions: u}},
		}}}
	}
	own := &cri.UserNamespace{Uids: []*cri.IDMapping{{HostId: 100, Length: 10}}, Gids: []*cri.IDMapping{{HostId: 200, Length: 10}}}
	sb := sandbox(own)
	if uid, gid := sb.HostID(3, 4); sb.UserNS() != own || uid != 103 || gid != 204 {
		t.Errorf("got %v, %d:%d", sb.UserNS(), uid, gid)
	}
	for _, sb := range []record.Sandbox{sandbox(nil), sandbox(&cri.UserNamespace{Mode: cri.NamespaceMode_NODE}), {Config: &cri.PodSandboxConfig{}}} {
		if uid, gid := sb.HostID(3, 4); sb.UserNS() != nil || uid != 3 || gid != 4 {
			t.Errorf("the node's: %v, %d:%d", sb.UserNS(), uid, gid)
		}
	}
}
