package lifecycle

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// rangeSize is how many users the kubelet gives a pod.
const rangeSize = 1 << 16

// ranges counts the ranges of users that tests took.
var ranges atomic.Uint32

// newRange is a user namespace for a pod with numbers of its own, as the
// kubelet chooses them.
func newRange() *cri.UserNamespace {
	first := (10 + ranges.Add(1)) * rangeSize
	mapping := func() []*cri.IDMapping { return []*cri.IDMapping{{HostId: first, Length: rangeSize}} }
	return &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: mapping(), Gids: mapping()}
}

// hostRoot is the number that root in the user namespace has on the host.
func hostRoot(u *cri.UserNamespace) uint32 { return u.Uids[0].HostId }

// withUserns gives the pod a user namespace.
func withUserns(u *cri.UserNamespace) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = u }
}

// needsUserns ends the test if the runtime of the handler under test offers no user
// namespaces, as the daemon's status has it: a pod that asks for one is refused, and
// told why. Whether the status is right is RTH_02's.
func needsUserns(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	offers := func() bool {
		known, _ := handlers(t, d)
		return known[""].GetUserNamespaces()
	}
	if offers() {
		return
	}
	config := d.PodConfig("needs-userns")
	withUserns(newRange())(config)
	id, err := d.StartPod(t.Context(), config, "") // which waits for the runtime to be asked
	if err == nil {
		err = d.RemovePod(t.Context(), id)
	}
	if offers() {
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	wantError(t, err, codes.FailedPrecondition, "user namespace", "its runtime does not offer")
	t.Skip("the runtime of the default handler offers no user namespaces; a pod that asks for one is refused")
}

// userBox is a pod with a user namespace.
type userBox struct {
	*box
	u *cri.UserNamespace
}

func newUserBox(t *testing.T, edits ...func(*cri.PodSandboxConfig)) *userBox {
	t.Helper()
	return newUserBoxOn(t, shared(t), edits...)
}

func newUserBoxOn(t *testing.T, d *daemon.Daemon, edits ...func(*cri.PodSandboxConfig)) *userBox {
	t.Helper()
	needsUserns(t, d)
	u := newRange()
	return &userBox{newBoxOn(t, d, append(edits, withUserns(u))...), u}
}

// pausedUserBox is newUserBoxOn for a pod with a pause process.
func pausedUserBox(t *testing.T, d *daemon.Daemon, edits ...func(*cri.PodSandboxConfig)) *userBox {
	t.Helper()
	u := newRange()
	return &userBox{pausedBox(t, d, append(edits, withUserns(u))...), u}
}

// in gives a container the namespaces of the pod, as the kubelet does.
func (b *userBox) in(c *cri.ContainerConfig) *cri.ContainerConfig {
	o := c.Linux.SecurityContext.NamespaceOptions
	o.UsernsOptions = b.u
	o.Network = b.config.Linux.SecurityContext.NamespaceOptions.Network
	return c
}

func (b *userBox) sleeper(name string) *cri.ContainerConfig { return b.in(b.box.sleeper(name)) }

func (b *userBox) script(name, text string) *cri.ContainerConfig {
	return b.in(b.box.script(name, text))
}

// ownerOf is who owns a file, by the host's numbers.
func ownerOf(t *testing.T, path string) (uid, gid uint32) {
	t.Helper()
	var s unix.Stat_t
	if err := unix.Lstat(path, &s); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return s.Uid, s.Gid
}

// wantOwner wants a file to have an owner, by the host's numbers.
func wantOwner(t *testing.T, path string, id uint32) {
	t.Helper()
	if uid, gid := ownerOf(t, path); uid != id || gid != id {
		t.Errorf("%s belongs to %d:%d, want %d", path, uid, gid, id)
	}
}

// lines is a table with single spaces, as of a uid_map.
func lines(text string) string {
	var out []string
	for line := range strings.Lines(text) {
		out = append(out, strings.Join(strings.Fields(line), " "))
	}
	return strings.Join(out, "\n")
}

// ownerNamespace is the user namespace that owns the process's
// namespace of that kind.
func ownerNamespace(t *testing.T, pid int, kind string) string {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var s unix.Stat_t
	if err := unix.Fstat(fd, &s); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("user:[%d]", s.Ino)
}
