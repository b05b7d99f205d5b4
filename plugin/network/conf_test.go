package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
)

func TestReadConf(t *testing.T) {
	for _, c := range []struct {
		name, file, text string
		plugins          []string
		bad              bool
	}{
		{name: "list", file: "a.conflist", text: `{"name":"n","plugins":[{"type":"x"},{"type":"y"}]}`, plugins: []string{"x", "y"}},
		{name: "single", file: "a.conf", text: `{"name":"n","type":"x"}`, plugins: []string{"x"}},
		{name: "single json", file: "a.json", text: `{"name":"n","type":"x"}`, plugins: []string{"x"}},
		{name: "list in a conf", file: "a.conf", text: `{"name":"n","plugins":[{"type":"x"}]}`, bad: true},
		{name: "no plugins", file: "a.conflist", text: `{"name":"n","plugins":[]}`, bad: true},
		{name: "no name", file: "a.conflist", text: `{"plugins":[{"type":"x"}]}`, bad: true},
		{name: "bad name", file: "a.conf", text: `{"name":"../n","type":"x"}`, bad: true},
		{name: "path as type", file: "a.conf", text: `{"name":"n","type":"/bin/sh"}`, bad: true},
		{name: "not JSON", file: "a.conflist", text: `name: n`, bad: true},
		{name: "empty", file: "a.conflist", text: ``, bad: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), c.file)
			if err := os.WriteFile(file, []byte(c.text), 0o644); err != nil {
				t.Fatal(err)
			}
			list, err := readConf(file)
			if c.bad {
				if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), file) {
					t.Errorf("%v, want failed precondition naming the file", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := pluginTypes(list); !reflect.DeepEqual(got, c.plugins) {
				t.Errorf("plugins %v, want %v", got, c.plugins)
			}
		})
	}
}

func pluginTypes(list *libcni.NetworkConfigList) []string {
	var names []string
	for _, p := range list.Plugins {
		names = append(names, p.Network.Type)
	}
	return names
}

// TestFreezePluginFiles keeps the plugins that a list takes from a directory.
func TestFreezePluginFiles(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"10-n.conflist": `{"cniVersion":"1.1.0","name":"n","disableGC":true,"plugins":[{"type":"x","a":{"b":[1,2]}}]}`,
		"n/20-y.conf":   `{"type":"y"}`,
	} {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	list, err := readConf(filepath.Join(dir, "10-n.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	frozen, err := freeze("eth0", list)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	got, err := frozen.list()
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"x", "y"}; !reflect.DeepEqual(pluginTypes(got), want) || got.CNIVersion != "1.1.0" || !got.DisableGC {
		t.Errorf("thawed %+v with %v", got, pluginTypes(got))
	}
	if !bytes.Contains(got.Plugins[0].Bytes, []byte(`"b":[1,2]`)) {
		t.Errorf("plugin configuration %s", got.Plugins[0].Bytes)
	}
}

// FuzzConf: a configuration that is accepted can be saved and read back.
func FuzzConf(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"x","ipam":{"type":"y"}}]}`), true)
	f.Add([]byte(`{"cniVersions":["1.0.0","0.4.0"],"name":"n","type":"x","capabilities":{"dns":true}}`), false)
	f.Add([]byte(`{"name":1}`), true)
	f.Add([]byte(`null`), false)
	f.Fuzz(func(t *testing.T, data []byte, list bool) {
		parse := parseSingle
		if list {
			parse = libcni.NetworkConfFromBytes
		}
		conf, err := parse(data)
		if err != nil || checkConf(conf) != nil {
			return
		}
		frozen, err := freeze("eth0", conf)
		if err != nil {
			t.Fatalf("freeze %q: %v", data, err)
		}
		again, err := frozen.list()
		if err != nil {
			t.Fatalf("thaw %q: %v", frozen.Conf, err)
		}
		if !reflect.DeepEqual(pluginTypes(again), pluginTypes(conf)) || again.Name != conf.Name || again.CNIVersion != conf.CNIVersion {
			t.Errorf("%q became %q", data, frozen.Conf)
		}
	})
}

// FuzzSaved: no file makes reading a saved attachment panic, and what is
// accepted can be used.
func FuzzSaved(f *testing.F) {
	good, err := json.Marshal(saved{ID: "a1", NetNS: "/n", Args: [][2]string{{"A", "b"}}, Networks: []savedNetwork{
		{IfName: "eth0", Conf: json.RawMessage(`{"name":"n","plugins":[{"type":"x"}]}`)},
	}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"id":"a1","networks":[{}]}`))
	f.Add([]byte(`{"id":"a2"}`))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		s := thaw("a1", data)
		if s == nil {
			return
		}
		for _, a := range s.Networks {
			if _, err := a.list(); err != nil {
				t.Errorf("%q: %v", data, err)
			}
		}
	})
}

// FuzzComplaint: whatever a plugin prints becomes a bounded message.
func FuzzComplaint(f *testing.F) {
	f.Add([]byte(`{"code":7,"msg":"m","details":"d"}`), []byte(""))
	f.Add([]byte(`{"code":-1}`), []byte("panic: x"))
	f.Add([]byte("\xff\x00"), []byte(strings.Repeat("y", 4096)))
	f.Fuzz(func(t *testing.T, stdout, stderr []byte) {
		_, msg := complaint(stdout, stderr, errors.New("exit status 1"))
		if msg == "" || (!json.Valid(stdout) && len(msg) > 4096) {
			t.Errorf("message of %d bytes", len(msg))
		}
	})
}

// TestSaved replaces and removes what is saved, and takes a torn write for
// nothing.
func TestSaved(t *testing.T) {
	d := savedDir(t.TempDir())
	if s, err := d.read("a1"); s != nil || err != nil {
		t.Errorf("read of nothing: %v, %v", s, err)
	}
	if err := d.write(&saved{ID: "a1", NetNS: "/1"}); err != nil {
		t.Fatal(err)
	}
	if err := d.write(&saved{ID: "a1", NetNS: "/2"}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.path("a2")+".new", []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := d.read("a1"); err != nil || s.NetNS != "/2" {
		t.Errorf("read: %+v, %v", s, err)
	}
	if ids, err := d.ids(); err != nil || !reflect.DeepEqual(ids, []string{"a1", "a2"}) {
		t.Errorf("ids %v, %v", ids, err)
	}
	for _, id := range []string{"a1", "a2", "a3"} {
		if err := d.remove(id); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(string(d)); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestGate(t *testing.T) {
	var g gate
	ctx := t.Context()
	first, err := g.enter(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	other, err := g.enter(ctx, "b") // does not wait for a
	if err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := g.enter(gone, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("second call for a: %v", err)
	}
	if _, _, err := g.alone(gone); !errors.Is(err, context.Canceled) {
		t.Errorf("alone beside others: %v", err)
	}
	swept := make(chan struct{})
	go func() {
		defer close(swept)
		_, open, err := g.alone(ctx)
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := g.enter(gone, "c"); !errors.Is(err, context.Canceled) {
			t.Errorf("a call beside a sweep: %v", err)
		}
		open()
	}()
	first()
	other()
	<-swept
	last, err := g.enter(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	last()
}
