package lifecycle

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/nri/pkg/api"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// overheard is what a daemon has said to the shims of a handler.
type overheard struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (o *overheard) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

// has reports whether all of the words were said.
func (o *overheard) has(words ...string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, w := range words {
		if !bytes.Contains(o.text.Bytes(), []byte(w)) {
			return false
		}
	}
	return true
}

// overhear makes a shim for one pod, which is runc's behind a socket that passes
// everything on, and returns its path.
func overhear(t *testing.T) (shim string, said *overheard) {
	t.Helper()
	dir, said := t.TempDir(), &overheard{}
	shim, socket := filepath.Join(dir, "containerd-shim-overheard-v2"), filepath.Join(dir, "s")
	// The answer to its start is binary, with the length of the address in it:
	// slashes make the other one as long.
	script := fmt.Sprintf(`#!/bin/sh
case " $* " in
*" start "*) ;;
*) exec containerd-shim-runc-v2 "$@" ;;
esac
export LC_ALL=C
socket=%s
containerd-shim-runc-v2 "$@" >$socket.answer || exit
real=$(grep -ao 'unix://[^[:cntrl:]]*' $socket.answer | cut -c8-)
echo "$real" >$socket.real
padded=$socket
while [ ${#padded} -lt ${#real} ]; do padded=/$padded; done
exec sed "s|$real|$padded|" $socket.answer
`, socket)
	if err := os.WriteFile(shim, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				if err := said.pass(conn, socket+".real"); err != nil {
					t.Error(err)
				}
			})
		}
	})
	return shim, said
}

// pass passes a connection on to the socket whose path is in the file.
func (o *overheard) pass(conn net.Conn, file string) error {
	defer conn.Close()
	path, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	shim, err := net.Dial("unix", strings.TrimSpace(string(path)))
	if err != nil {
		return nil // it has ended, which the daemon is to see
	}
	var back sync.WaitGroup
	back.Go(func() {
		defer conn.Close()
		io.Copy(conn, shim) // ends as the connection does
	})
	io.Copy(io.MultiWriter(shim, o), conn) // ends as the connection does
	shim.Close()
	back.Wait()
	return nil
}

// updateWith changes a container's resources, with options for who does it.
func (b *box) updateWith(id string, r *cri.LinuxContainerResources, annotations map[string]string) error {
	_, err := b.Runtime().UpdateContainerResources(b.t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: r, Annotations: annotations})
	return err
}

// TestRES_35_UpdateAnnotations: what an update says beside the resources reaches
// NRI plugins and the shim, for that update alone, and goes before what the
// container says.
func TestRES_35_UpdateAnnotations(t *testing.T) {
	t.Parallel()
	shim, said := overhear(t)
	d := start(t, daemon.Edit(patientWithNRI), daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		addHandler(in, c, "overheard", daemon.Config{"runtime_path": shim})
	}))
	var mu sync.Mutex
	var seen map[string]string
	p := &nriPlugin{t: t, name: "10-reader", update: func(ctr *api.Container, _ *api.LinuxResources) []*api.ContainerUpdate {
		mu.Lock()
		defer mu.Unlock()
		seen = maps.Clone(ctr.GetAnnotations())
		return nil
	}}
	p.connect(d)
	config := d.PodConfig("updated")
	hostNetwork(config)
	b := &box{Daemon: d, t: t, image: plain(t, d), config: config, pod: d.RunPodWith(config, "overheard")}
	c := onHost(b.sleeper("app"))
	c.Annotations = map[string]string{"test/own": "stays", "test/how": "at first"}
	id := b.run(c)
	wants := func(how, extra string) {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if seen["test/own"] != "stays" || seen["test/how"] != how || seen["test/extra"] != extra {
			t.Errorf("the plugin saw %v, want how %q, extra %q", seen, how, extra)
		}
	}
	if err := b.update(id, &cri.LinuxContainerResources{CpuShares: 100}); err != nil {
		t.Fatal(err)
	}
	wants("at first", "")
	if said.has("test/extra") {
		t.Error("the shim has heard of what nobody said")
	}
	if err := b.updateWith(id, &cri.LinuxContainerResources{CpuShares: 200}, map[string]string{"test/how": "gently-please", "test/extra": "a-whole-word"}); err != nil {
		t.Fatal(err)
	}
	wants("gently-please", "a-whole-word")
	if !said.has("Update", "test/how", "gently-please", "test/extra", "a-whole-word") {
		t.Error("the shim has not heard what the update says")
	}
	if err := b.update(id, &cri.LinuxContainerResources{CpuShares: 300}); err != nil {
		t.Fatal(err)
	}
	wants("at first", "")
	if got := b.status(id); got.Annotations["test/how"] != "at first" || got.Annotations["test/extra"] != "" {
		t.Errorf("the container's annotations are %v", got.Annotations)
	}
	if err := errors.Join(stopPod(d, b.pod), removePod(d, b.pod)); err != nil {
		t.Error(err)
	}
}
