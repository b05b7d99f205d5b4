package task

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// found are the namespaces of a sandbox that has the host's network.
func found(_ string, kind specs.LinuxNamespaceType) (string, error) {
	switch kind {
	case specs.IPCNamespace:
		return "/pins/ipc", nil
	case specs.NetworkNamespace:
		return "", nil
	}
	return "", errdefs.ErrFailedPrecondition
}

// filesOf are those of the sandbox "files".
func filesOf(id string) (map[string]string, error) {
	if id != "files" {
		return nil, nil
	}
	return map[string]string{"/etc/hostname": "/f/hostname", "/etc/hosts": "/f/hosts", "/dev/shm": "/f/shm"}, nil
}

func TestJoinSandbox(t *testing.T) {
	for name, tc := range map[string]struct {
		spec, sandbox, want string
		err                 error
	}{
		"by a process": {spec: `{"linux":{"namespaces":[{"type":"ipc","path":"/proc/7/ns/ipc"}]}}`, want: `{"linux":{"namespaces":[{"type":"ipc","path":"/proc/7/ns/ipc"}]}}`},
		"pinned, the host's and own": {
			spec:    `{"x":12345678901234567890,"linux":{"y":[1],"namespaces":[{"type":"ipc","path":"/proc/0/ns/ipc"},{"type":"network","path":"/proc/0/ns/net"},{"type":"pid"}]}}`,
			sandbox: "s", want: `{"linux":{"namespaces":[{"type":"ipc","path":"/pins/ipc"},{"type":"pid"}],"y":[1]},"x":12345678901234567890}`,
		},
		"no sandbox": {spec: `{"linux":{"namespaces":[{"type":"ipc","path":"/proc/0/ns/ipc"}]}}`, err: errdefs.ErrInvalidArgument},
		"not shared": {spec: `{"linux":{"namespaces":[{"type":"pid","path":"/proc/0/ns/pid"}]}}`, sandbox: "s", err: errdefs.ErrFailedPrecondition},
		"files": {
			spec: `{"root":{"readonly":true},"mounts":[{"destination":"/dev/shm","type":"tmpfs"},{"destination":"/etc/hosts","type":"bind","z":1}]}`, sandbox: "files",
			want: `{"mounts":[{"destination":"/dev/shm","type":"bind","source":"/f/shm","options":["rbind","rprivate","rw","nosuid","noexec","nodev"]},{"destination":"/etc/hosts","type":"bind","z":1},` +
				`{"destination":"/etc/hostname","type":"bind","source":"/f/hostname","options":["rbind","rprivate","ro"]}],"root":{"readonly":true}}`,
		},
		"no table": {spec: `{"linux":["/proc/0/ns/pid"]}`, sandbox: "s", err: errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			bundle := t.TempDir()
			file := filepath.Join(bundle, configFile)
			must(t, os.WriteFile(file, []byte(tc.spec), 0o600))
			if tc.sandbox != "" {
				must(t, os.WriteFile(filepath.Join(bundle, sandboxFile), []byte(tc.sandbox), 0o600))
			}
			if err := joinSandbox(bundle, found, filesOf); !errors.Is(err, tc.err) {
				t.Errorf("error %v, want %v", err, tc.err)
			}
			want := tc.want
			if tc.err != nil {
				want = tc.spec
			}
			if got, err := os.ReadFile(file); err != nil || string(got) != want {
				t.Errorf("%s, %v; want %s", got, err, want)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// FuzzJoinedSpec: what comes out names no namespace of process 0, and is otherwise
// what went in.
func FuzzJoinedSpec(f *testing.F) {
	f.Add([]byte(`{"linux":{"namespaces":[{"type":"ipc","path":"/proc/0/ns/ipc"},{"type":"pid"}]},"hostname":"<h>"}`))
	f.Add([]byte(`{"linux":{"namespaces":null}}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		out, err := joinedSpec(data, func(specs.LinuxNamespaceType) (string, error) { return "/pins/x", nil })
		if err != nil {
			return
		}
		var before, after map[string]any
		must(t, json.Unmarshal(data, &before))
		must(t, json.Unmarshal(out, &after))
		if list, ok := after["linux"].(map[string]any)["namespaces"].([]any); ok {
			for _, ns := range list {
				if path, ok := ns.(map[string]any)["path"].(string); ok && len(path) >= len(noProcess) && path[:len(noProcess)] == noProcess {
					t.Errorf("%s is left", path)
				}
			}
		}
		delete(before["linux"].(map[string]any), "namespaces")
		delete(after["linux"].(map[string]any), "namespaces")
		if !reflect.DeepEqual(before, after) {
			t.Errorf("%v has become %v", before, after)
		}
	})
}
