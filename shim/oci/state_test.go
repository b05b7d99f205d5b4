package oci

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
)

const plainState = `{"id":"a","init_process_pid":7,"init_process_start":9,"cgroup_paths":{"":"/cg/a"},"config":{"cgroups":{}}}`

func TestParseState(t *testing.T) {
	for name, c := range map[string]struct {
		in        string
		ok, plain bool
	}{
		"plain":              {plainState, true, true},
		"of another":         {`{"id":"b","init_process_pid":7,"cgroup_paths":{"":"/cg/a"},"config":{"cgroups":{}}}`, false, true},
		"no process":         {`{"id":"a","cgroup_paths":{"":"/cg/a"},"config":{"cgroups":{}}}`, false, true},
		"no groups":          {`{"id":"a","init_process_pid":7,"config":{"cgroups":{}}}`, false, true},
		"relative":           {`{"id":"a","init_process_pid":7,"cgroup_paths":{"":"cg"},"config":{"cgroups":{}}}`, false, true},
		"upwards":            {`{"id":"a","init_process_pid":7,"cgroup_paths":{"":"/cg/../x"},"config":{"cgroups":{}}}`, false, true},
		"systemd":            {`{"id":"a","init_process_pid":7,"cgroup_paths":{"":"/cg/a"},"config":{"cgroups":{"Systemd":true}}}`, true, false},
		"resource directory": {`{"id":"a","init_process_pid":7,"cgroup_paths":{"":"/cg/a"},"intel_rdt_path":"/r","config":{"cgroups":{}}}`, true, false},
		"rootless":           {`{"id":"a","init_process_pid":7,"rootless":true,"cgroup_paths":{"":"/cg/a"},"config":{"cgroups":{}}}`, true, false},
	} {
		s, ok := parseState([]byte(c.in), "a")
		if ok != c.ok || ok && s.plain() != c.plain {
			t.Errorf("%s: %t, %+v", name, ok, s)
		}
	}
}

func FuzzParseState(f *testing.F) {
	f.Add([]byte(plainState))
	f.Fuzz(func(_ *testing.T, b []byte) {
		if s, ok := parseState(b, "a"); ok {
			s.plain()
		}
	})
}

// fakeRuntime is a runtime that leaves a file when it is called, and a container of
// which that process is the first.
func fakeRuntime(t *testing.T, pid int, start uint64, config string) (r *Runtime, called, group string) {
	t.Helper()
	dir := t.TempDir()
	called, group = filepath.Join(dir, "called"), filepath.Join(dir, "group")
	binary := filepath.Join(dir, "runtime")
	root := filepath.Join(dir, "root")
	files := map[string]string{
		binary:                                 "#!/bin/sh\necho \"$*\" > " + called + "\n",
		filepath.Join(dir, "config.json"):      config,
		filepath.Join(root, "ns/a", stateName): fmt.Sprintf(`{"id":"a","init_process_pid":%d,"init_process_start":%d,"cgroup_paths":{"":%q},"config":{"cgroups":{}}}`, pid, start, group),
		filepath.Join(group, "cgroup.freeze"):  "0\n",
	}
	for path, text := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return New("ns", "a", dir, &options.Options{BinaryName: binary, Root: root}), called, group
}

// endedPid is the number of a process that has ended.
func endedPid(t *testing.T) int {
	t.Helper()
	c := exec.Command("true")
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	return c.Process.Pid
}

// TestDelete: the runtime is called for what cannot be taken away without it, and
// not for what can.
func TestDelete(t *testing.T) {
	for name, c := range map[string]struct {
		pid     int
		config  string
		prepare func(group string) error
		called  bool
	}{
		"ended":         {endedPid(t), `{}`, func(g string) error { return os.Remove(g + "/cgroup.freeze") }, false},
		"no group":      {endedPid(t), `{}`, os.RemoveAll, false},
		"another's pid": {os.Getpid(), `{}`, os.RemoveAll, false},
		"poststop":      {endedPid(t), `{"hooks":{"poststop":[{"path":"/x"}]}}`, os.RemoveAll, true},
		"other hooks":   {endedPid(t), `{"hooks":{"prestart":[{"path":"/x"}],"poststop":[]}}`, os.RemoveAll, false},
		"no config":     {endedPid(t), ``, os.RemoveAll, true},
		"group in use":  {endedPid(t), `{}`, func(string) error { return nil }, true},
	} {
		t.Run(name, func(t *testing.T) {
			r, called, group := fakeRuntime(t, c.pid, 1, c.config)
			if err := c.prepare(group); err != nil {
				t.Fatal(err)
			}
			if err := r.Delete(t.Context(), true); err != nil {
				t.Fatal(err)
			}
			_, err := os.Stat(called)
			if (err == nil) != c.called {
				t.Errorf("the runtime was called: %t, want %t", err == nil, c.called)
			}
			if _, err := os.Stat(r.dir()); (err == nil) != c.called {
				t.Errorf("its directory: %v", err)
			}
		})
	}
}

// TestStatus: files of the runtime and the kernel say what a container is.
func TestStatus(t *testing.T) {
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	_, start, _ := parseStat(string(stat))
	r, called, group := fakeRuntime(t, os.Getpid(), start, `{}`)
	is := func(want string) {
		t.Helper()
		if got, err := r.Status(t.Context()); err != nil || got != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	is("running")
	fifo := filepath.Join(r.dir(), StartPipe)
	if err := os.WriteFile(fifo, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	is("created")
	if err := os.WriteFile(filepath.Join(group, "cgroup.freeze"), []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	is("paused")
	if _, err := os.Stat(called); err == nil {
		t.Error("the runtime was called")
	}
	gone, _, _ := fakeRuntime(t, endedPid(t), 1, `{}`)
	if got, err := gone.Status(t.Context()); err != nil || got != "stopped" {
		t.Errorf("%q, %v", got, err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20")
	f.Fuzz(func(_ *testing.T, s string) { parseStat(s) })
}
