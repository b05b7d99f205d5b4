package lifecycle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
	"github.com/gantry-cri/gantry/integration/registry"
)

// runtimeKey sets a key of the runtime table.
func runtimeKey(value any, path ...string) daemon.Option {
	return daemon.Set(value, append([]string{"plugins", daemon.RuntimePlugin}, path...)...)
}

// startedBy runs the daemon by way of another program, which must end in an exec
// of its arguments.
func startedBy(t *testing.T, command ...string) daemon.Option {
	t.Helper()
	path := filepath.Join(t.TempDir(), "containerd")
	binary := built(t, "containerd")
	text := "#!/bin/sh\nexec " + strings.Join(command, " ") + " " + binary + " \"$@\"\n"
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return daemon.Binary(path)
}

// built is a program of those that are tested.
func built(t *testing.T, name string) string {
	t.Helper()
	dirs, err := daemon.BinDirs()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		if p := filepath.Join(d, name); exists(p) {
			return p
		}
	}
	t.Fatalf("no %s in %s", name, dirs)
	return ""
}

// TestSEC_03_DefaultCapabilities: the node's list is where a container begins,
// and one that goes beyond what is known stops the daemon.
func TestSEC_03_DefaultCapabilities(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t, runtimeKey([]string{"CHOWN", "CAP_NET_ADMIN"}, "default_capabilities")))
	bounds := func(name string, c *cri.Capability) uint64 {
		config := b.sleeper(name)
		config.Linux.SecurityContext.Capabilities = c
		return capsOf(t, b.procStatus(b.run(config)), "CapBnd")
	}
	if got := bounds("list", nil); got != chown|netAdmin {
		t.Errorf("by default %x", got)
	}
	if got := bounds("changed", &cri.Capability{AddCapabilities: []string{"NET_RAW"}, DropCapabilities: []string{"CHOWN"}}); got != netAdmin|netRaw {
		t.Errorf("with NET_RAW, without CHOWN %x", got)
	}
	if got := bounds("none", &cri.Capability{DropCapabilities: []string{"ALL"}}); got != 0 {
		t.Errorf("without all %x", got)
	}
	if got := bounds("all", &cri.Capability{AddCapabilities: []string{"ALL"}}); got != b.bounding() {
		t.Errorf("with all %x", got)
	}
}

// profileFile writes a seccomp profile that allows all but the system calls.
func profileFile(t *testing.T, path string, forbidden ...string) {
	t.Helper()
	text, err := json.Marshal(map[string]any{
		"defaultAction": "SCMP_ACT_ALLOW",
		"syscalls":      []map[string]any{{"names": forbidden, "action": "SCMP_ACT_ERRNO"}},
	})
	if err == nil {
		err = os.WriteFile(path, text, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// forbids runs a command in the container and wants the kernel to say no.
func (b *box) forbids(id string, command ...string) {
	b.t.Helper()
	if out, code := tryExec(b.t, b.Daemon, id, command...); code == 0 || !strings.Contains(out, "not permitted") {
		b.t.Errorf("%q: %q, %d", command, out, code)
	}
}

// TestSEC_14_UnsetSeccompProfile: a request that names no profile gets the
// configured one, and one that names any gets that.
func TestSEC_14_UnsetSeccompProfile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "node.json")
	profileFile(t, path, "mkdir", "mkdirat")
	for profile, check := range map[string]func(b *box, id string){
		"localhost/" + path: func(b *box, id string) {
			b.forbids(id, "mkdir", "/tmp/x")
			b.Exec(id, "unshare", "-U", "true")
		},
		"runtime/default": func(b *box, id string) {
			b.Exec(id, "mkdir", "/tmp/x")
			b.forbids(id, "unshare", "-U", "true")
		},
	} {
		b := newBoxOn(t, start(t, runtimeKey(profile, "unset_seccomp_profile")))
		id := b.run(b.sleeper("unset"))
		if got := field(t, b.procStatus(id), "Seccomp:"); got != "2" {
			t.Errorf("%s: Seccomp is %s", profile, got)
		}
		check(b, id)
		id = b.run(b.withSeccomp("named", &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}))
		b.Exec(id, "sh", "-c", "mkdir /tmp/x && unshare -U true")
	}
}

// TestPOD_25_OldSeccompString: the string of a pod and of a container is
// understood where there is no typed field, which goes first.
func TestPOD_25_OldSeccompString(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "profile.json")
	profileFile(t, path, "mkdir", "mkdirat")
	b := newBox(t)
	status := func(pid any) string {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%v/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		return field(t, string(text), "Seccomp:")
	}
	const filtered = "2"
	open := status("self")
	for name, row := range map[string]struct {
		old   string
		typed *cri.SecurityProfile
		want  string
	}{
		"none":       {"", nil, open},
		"default":    {"runtime/default", nil, filtered},
		"docker":     {"docker/default", nil, filtered},
		"unconfined": {"unconfined", nil, open},
		"localhost":  {"localhost/" + path, nil, filtered},
		"both":       {"localhost/" + path, &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}, open},
	} {
		p := runPaused(b.Daemon, "old-"+name, func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.Seccomp, c.Linux.SecurityContext.SeccompProfilePath = row.typed, row.old //nolint:staticcheck // kubelets of old send it
		})
		pause := pidOf(t, b.Daemon, p.id)
		begun(t, pause)
		c := b.withSeccomp("old-"+name, row.typed)
		c.Linux.SecurityContext.SeccompProfilePath = row.old //nolint:staticcheck // as above
		id := b.run(c)
		for who, got := range map[string]string{"sandbox": status(pause), "container": field(t, b.procStatus(id), "Seccomp:")} {
			if got != row.want {
				t.Errorf("%s: the %s has mode %s, want %s", name, who, got, row.want)
			}
		}
		if name == "localhost" {
			b.forbids(id, "mkdir", "/tmp/x")
		} else {
			b.Exec(id, "mkdir", "/tmp/x")
		}
	}
	for old, words := range map[string]string{"strict": "seccomp_profile_path", "localhost/relative": "seccomp_profile_path.localhost_ref", "localhost/": "seccomp_profile_path.localhost_ref"} {
		c := b.sleeper("bad")
		c.Linux.SecurityContext.SeccompProfilePath = old //nolint:staticcheck // as above
		b.refused(c, codes.InvalidArgument, words)
		config := b.PodConfig("bad")
		config.Linux.SecurityContext.SeccompProfilePath = old //nolint:staticcheck // as above
		if _, err := b.StartPod(t.Context(), config, ""); err == nil || !strings.Contains(err.Error(), codes.InvalidArgument.String()) || !strings.Contains(err.Error(), words) {
			t.Errorf("pod with %q: %v", old, err)
		}
	}
}

// TestSEC_04_InheritableCapabilities: where the node wants it, the first process
// and commands have all that they may use inheritable, and none is ambient.
func TestSEC_04_InheritableCapabilities(t *testing.T) {
	t.Parallel()
	for name, on := range map[string]bool{"on": true, "off": false} {
		b := newBoxOn(t, start(t, runtimeKey(on, "add_inheritable_capabilities")))
		c := b.sleeper(name)
		c.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"CHOWN"}}
		id := b.run(c)
		for who, text := range map[string]string{"first process": b.procStatus(id), "command": b.Exec(id, "cat", "/proc/self/status")} {
			bounds, want := capsOf(t, text, "CapBnd"), uint64(0)
			if on {
				want = bounds
			}
			if bounds&netAdmin == 0 || bounds&chown != 0 || capsOf(t, text, "CapInh") != want || capsOf(t, text, "CapAmb") != 0 {
				t.Errorf("%s: the %s has bounds %x, inheritable %x, ambient %x", name, who, bounds, capsOf(t, text, "CapInh"), capsOf(t, text, "CapAmb"))
			}
		}
	}
}

// TestSEC_15_CustomDefaultProfile: files of the node and of a handler stand for
// the built-in profile. They are read for every container.
func TestSEC_15_CustomDefaultProfile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	node, special := filepath.Join(dir, "node.json"), filepath.Join(dir, "special.json")
	profileFile(t, node, "mkdir", "mkdirat")
	profileFile(t, special, "symlink", "symlinkat")
	handler := func(key string) []string { return []string{"containerd", "runtimes", "special", key} }
	d := start(t, runtimeKey(node, "seccomp_profile"), runtimeKey(special, handler("seccomp_profile")...),
		runtimeKey("io.containerd.runc.v2", handler("runtime_type")...))
	b := newBoxOn(t, d)
	id := b.run(b.withSeccomp("node", byDefault))
	b.forbids(id, "mkdir", "/tmp/x")
	b.Exec(id, "ln", "-s", "a", "/tmp/link")

	config := d.PodConfig("special")
	other := &box{Daemon: d, t: t, image: b.image, config: config, pod: d.RunPodWith(config, "special")}
	id = other.run(other.withSeccomp("special", byDefault))
	other.forbids(id, "ln", "-s", "a", "/tmp/link")
	other.Exec(id, "mkdir", "/tmp/x")

	profileFile(t, node, "rmdir", "unlinkat")
	id = b.run(b.withSeccomp("changed", byDefault))
	b.Exec(id, "mkdir", "/tmp/x")
	b.forbids(id, "rmdir", "/tmp/x")
	for name, spoil := range map[string]func() error{
		"broken": func() error { return os.WriteFile(node, []byte("{"), 0o644) }, "missing": func() error { return os.Remove(node) },
	} {
		if err := spoil(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if _, err := b.create(b.withSeccomp(name, byDefault)); err == nil || !strings.Contains(err.Error(), "node.json") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSEC_31_DefaultUlimits: also of commands in the container.
func TestSEC_31_DefaultUlimits(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t, runtimeKey([]string{"nofile=321:654", "core=0"}, "default_ulimits")))
	id := b.run(b.sleeper("app"))
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", b.begun(id)))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"Max open files": "321 654 files", "Max core file size": "0 0 bytes"} {
		if got := strings.Join(strings.Fields(field(t, string(limits), name)), " "); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	if got := sh(b.Daemon, id, "ulimit -Sn; ulimit -Hn; ulimit -c"); got != "321\n654\n0" {
		t.Errorf("a command has %q", got)
	}
}

// TestSEC_35_RunAsNonRoot: what the image says of its user is told as it is: a
// number as a number, a name as a name, so that the kubelet can decide.
func TestSEC_35_RunAsNonRoot(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	number := func(n int64) *cri.Int64Value { return &cri.Int64Value{Value: n} }
	for user, want := range map[string]struct {
		uid  *cri.Int64Value
		name string
	}{
		"":                     {number(0), ""},
		"0":                    {number(0), ""},
		"1000":                 {number(1000), ""},
		"1000:3000":            {number(1000), ""},
		images.Alice:           {nil, images.Alice},
		images.Alice + ":crew": {nil, images.Alice},
		"root":                 {nil, "root"},
	} {
		ref := image(t, b.Daemon, images.Spec{User: user, Labels: map[string]string{"user": user}})
		resp, err := b.Images().ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
		if err != nil {
			t.Fatal(err)
		}
		got := resp.Image
		if got.Username != want.name || got.Uid.GetValue() != want.uid.GetValue() || want.uid != nil && want.uid.Value != 0 && got.Uid == nil {
			t.Errorf("user %q: uid %v, name %q", user, got.Uid, got.Username)
		}
		// Nothing at all is how an image without a user is told, and the
		// kubelet takes it for root.
		if user != "" && got.Uid == nil && got.Username == "" {
			t.Errorf("user %q: neither uid nor name", user)
		}
		if got.Uid != nil && got.Username != "" {
			t.Errorf("user %q: both uid %v and name %q", user, got.Uid, got.Username)
		}
		// The truth is what a container then is.
		id := b.run(daemon.ContainerConfig("as-"+strings.NewReplacer(":", "-").Replace("x"+user), ref))
		uid := strings.Fields(field(t, b.procStatus(id), "Uid:"))[1]
		if want.uid != nil && uid != fmt.Sprint(want.uid.Value) {
			t.Errorf("user %q: the container runs as %s", user, uid)
		}
		if s := b.status(id).GetUser().GetLinux(); fmt.Sprint(s.GetUid()) != uid {
			t.Errorf("user %q: the status says %d, the kernel %s", user, s.GetUid(), uid)
		}
	}
	// Numbers that do not fit are neither wrapped nor taken for a name.
	for _, user := range []string{"4294967296", "-1", "2147483648"} {
		ref := push(t, "nonroot:u"+strings.Trim(user, "-"), images.MustBuild(images.Spec{User: user}))
		mustPull(t, b.Daemon, ref)
		_, err := b.create(daemon.ContainerConfig("wrapped-"+strings.Trim(user, "-"), ref))
		wantError(t, err, codes.InvalidArgument, user)
	}
}

// open lists what users other than root can do more with than go through: the
// sockets, directories and files below dir, but for what pods are meant to see.
func open(t *testing.T, dir string, except ...string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if rel := strings.TrimPrefix(path, dir); slices.ContainsFunc(except, func(e string) bool { m, _ := filepath.Match(e, rel); return m }) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return nil //nolint:nilerr // it went away
		}
		mode := st.Mode & 0o777
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			if mode&0o066 != 0 {
				list = append(list, fmt.Sprintf("directory %s %o", path, mode))
			} else if mode&0o011 == 0 {
				return fs.SkipDir // nobody comes to what is below
			}
		case unix.S_IFSOCK:
			if mode&0o006 != 0 || mode&0o060 != 0 && st.Gid != 0 {
				list = append(list, fmt.Sprintf("socket %s %o", path, mode))
			}
		case unix.S_IFREG:
			if mode&0o022 != 0 {
				list = append(list, fmt.Sprintf("file %s %o", path, mode))
			}
		}
		if st.Uid != 0 {
			list = append(list, fmt.Sprintf("%s belongs to %d", path, st.Uid))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// ours are the directories of the CRI service below root and state.
func ours(d *daemon.Daemon) []string {
	const name = "io.containerd.grpc.v1.cri"
	return []string{filepath.Join(d.Root, name), filepath.Join(d.State, name)}
}

// TestSEC_37_Permissions_CVE_2024_25621: no umask opens what is the daemon's,
// and what an earlier release left open is closed by the next start.
func TestSEC_37_Permissions_CVE_2024_25621(t *testing.T) {
	t.Parallel()
	d := start(t, startedBy(t, "sh", "-c", `'umask 000; exec "$@"'`, "sh"))
	b := newBoxOn(t, d)
	b.run(b.sleeper("app"))
	audit := func(when string) {
		t.Helper()
		for _, dir := range ours(d) {
			var st unix.Stat_t
			if err := unix.Stat(dir, &st); err != nil || st.Mode&0o066 != 0 || st.Uid != 0 || st.Gid != 0 {
				t.Errorf("%s: %s has mode %o, owner %d:%d, %v", when, dir, st.Mode&0o777, st.Uid, st.Gid, err)
			}
			// Below, the files that containers see are as open as in any image.
			for _, what := range open(t, dir, "/sandboxes/*/shm", "/pause/rootfs") {
				t.Errorf("%s: %s", when, what)
			}
		}
		for _, socket := range []string{d.Socket, filepath.Join(d.State, "io.containerd.grpc.v1.cri", "gantry.sock")} {
			var st unix.Stat_t
			if err := unix.Stat(socket, &st); err != nil || st.Mode&0o006 != 0 || st.Mode&0o060 != 0 && st.Gid != 0 {
				t.Errorf("%s: socket %s has mode %o, %v", when, socket, st.Mode&0o777, err)
			}
		}
	}
	audit("with umask 000")
	d.Stop()
	for _, dir := range ours(d) {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() && !strings.Contains(path, "/shm") {
				err = os.Chmod(path, 0o777)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	d.Up()
	audit("after an upgrade")
	// The streams are for those who were given an address, on this machine.
	resp, err := d.Runtime().Exec(t.Context(), &cri.ExecRequest{ContainerId: b.run(b.sleeper("streams")), Cmd: []string{"true"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	host, _, err := net.SplitHostPort(strings.Split(strings.TrimPrefix(resp.Url, "http://"), "/")[0])
	if err != nil || !net.ParseIP(host).IsLoopback() {
		t.Errorf("streams are served at %s: %v", resp.Url, err)
	}
}

// TestSEC_38_NoSecretsInLogs: credentials are in no log, error, verbose answer
// or operation, with the log at its most talkative.
func TestSEC_38_NoSecretsInLogs(t *testing.T) {
	t.Parallel()
	d := start(t, daemon.Set("trace", "debug", "level"))
	secrets := []string{"pass-4711", "wrong-4711", "refresh-4711", "token-4711", "inurl-4711"}
	basic := registry.Auth{Mode: registry.Basic, User: "user", Password: secrets[0]}
	bearer := registry.Auth{Mode: registry.Bearer, User: "user", Password: secrets[0], RefreshToken: secrets[2], Tokens: []string{secrets[3]}}
	var told bytes.Buffer
	for i, row := range []struct {
		access registry.Auth
		auth   *cri.AuthConfig
		works  bool
	}{
		{basic, &cri.AuthConfig{Username: "user", Password: secrets[0]}, true},
		{basic, &cri.AuthConfig{Auth: base64Of("user:" + secrets[0])}, true},
		{basic, &cri.AuthConfig{Username: "user", Password: secrets[1]}, false},
		{basic, &cri.AuthConfig{Auth: base64Of("user:" + secrets[1])}, false},
		{basic, &cri.AuthConfig{Auth: secrets[1] + "%"}, false},
		{basic, &cri.AuthConfig{Username: "user", Password: secrets[0], ServerAddress: "https://user:" + secrets[4] + "@[bad"}, false},
		{bearer, &cri.AuthConfig{Username: "user", Password: secrets[0]}, true},
		{bearer, &cri.AuthConfig{IdentityToken: secrets[2]}, true},
		{bearer, &cri.AuthConfig{RegistryToken: secrets[3]}, true},
		{bearer, &cri.AuthConfig{RegistryToken: secrets[1]}, false},
		{bearer, &cri.AuthConfig{IdentityToken: secrets[1]}, false},
		{registry.Auth{Mode: registry.Bearer, Realm: "http://127.0.0.1:1/token"}, &cri.AuthConfig{Username: "user", Password: secrets[0]}, false},
	} {
		_, ref := serveImage(t, registry.Options{Auth: row.access}, blobImage(t, 1000))
		_, err := pull(t.Context(), d, ref, row.auth)
		if (err == nil) != row.works {
			t.Errorf("row %d: %v", i, err)
		}
		fmt.Fprintln(&told, err)
		resp, err := d.Images().ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}, Verbose: true})
		fmt.Fprintln(&told, resp, err)
	}
	// One that hangs is seen in the table of operations.
	hung, ref := serveImage(t, registry.Options{Auth: basic}, blobImage(t, 1000))
	hung.Inject(registry.Fault{Match: registry.Blobs(), Delay: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := pull(ctx, d, ref, &cri.AuthConfig{Username: "user", Password: secrets[0]})
		done <- err
	}()
	eventually(t, ample, func() error {
		if hung.Count(func(q registry.Request) bool { return strings.Contains(q.Path, "/blobs/") }) == 0 {
			return errors.New("the pull has not come to its layers")
		}
		return nil
	})
	text := operationsText(t, d)
	if !strings.Contains(text, ref) {
		t.Errorf("the pull of %s is not in the operations:\n%.2000s", ref, text)
	}
	told.WriteString(text)
	cancel()
	fmt.Fprintln(&told, <-done)
	status, err := d.Runtime().Status(t.Context(), &cri.StatusRequest{Verbose: true})
	fmt.Fprintln(&told, status, err)
	log, err := os.ReadFile(d.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), ref) || !strings.Contains(string(log), "level=debug") {
		t.Error("the log is not as talkative as it should be")
	}
	for _, secret := range secrets {
		for what, s := range map[string]string{"as it is": secret, "in base64": strings.TrimRight(base64Of("user:"+secret), "=")} {
			for where, text := range map[string]string{"answer": told.String(), "log": string(log)} {
				if i := strings.Index(text, s); i >= 0 {
					t.Errorf("%s %s is in a %s: …%.200s…", secret, what, where, text[max(0, i-100):])
				}
			}
		}
	}
}

// operationsText is what the operations socket tells, stacks included.
func operationsText(t *testing.T, d *daemon.Daemon) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(d.State, "io.containerd.grpc.v1.cri", "gantry.sock"))
	}}}
	defer client.CloseIdleConnections()
	var all strings.Builder
	for _, path := range []string{"/operations", "/stacks"} {
		resp, err := client.Get("http://gantry" + path)
		if err != nil {
			t.Fatal(err)
		}
		var body bytes.Buffer
		_, err = body.ReadFrom(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v", path, resp.Status, err)
		}
		all.Write(body.Bytes())
	}
	return all.String()
}

// TestSEC_39_CapabilityClamp: a daemon that lacks capabilities gives away what
// it has, and pods that ask for all start.
func TestSEC_39_CapabilityClamp(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("setpriv"); err != nil {
		t.Fatal(err)
	}
	d := start(t, startedBy(t, "setpriv", "--bounding-set", "-sys_time,-net_raw,-sys_boot"))
	b := newBoxOn(t, d, privileged)
	lacking := uint64(1)<<unix.CAP_SYS_TIME | netRaw | uint64(1)<<unix.CAP_SYS_BOOT
	own := b.bounding()
	if own&lacking != 0 {
		t.Fatalf("the daemon has %x", own)
	}
	add := b.sleeper("add")
	add.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"ALL"}}
	one := b.sleeper("one")
	one.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_TIME"}}
	for name, row := range map[string]struct {
		config *cri.ContainerConfig
		want   uint64
	}{"privileged": {b.privilegedSleeper("privileged"), own}, "all": {add, own}} {
		id := b.run(row.config)
		text := b.procStatus(id)
		if eff, bound := capsOf(t, text, "CapEff"), capsOf(t, text, "CapBnd"); eff != row.want || bound != row.want {
			t.Errorf("%s: effective %x, bounding %x, want %x", name, eff, bound, row.want)
		}
		b.Exec(id, "true")
	}
	if got := capsOf(t, b.procStatus(b.run(one)), "CapEff"); got&lacking != 0 || got&chown == 0 {
		t.Errorf("with SYS_TIME added %x", got)
	}
}

// TestSEC_40_Switches: each switch on a host where what it switches is absent
// or not wanted, and what disable_proc_mount changes.
func TestSEC_40_Switches(t *testing.T) {
	t.Parallel()
	b := newBoxOn(t, start(t, runtimeKey(true, "enable_selinux"), runtimeKey(true, "disable_apparmor"), runtimeKey(true, "disable_proc_mount")))
	c := b.sleeper("labelled")
	c.Linux.SecurityContext.MaskedPaths, c.Linux.SecurityContext.ReadonlyPaths = []string{"/proc/meminfo"}, []string{"/tmp"}
	c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{User: "system_u", Role: "system_r", Type: "container_t", Level: "s0:c1,c2"}
	c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	id := b.run(c)
	if got := sh(b.Daemon, id, "wc -c </proc/meminfo; wc -c </proc/timer_list"); strings.HasPrefix(got, "0\n") || !strings.HasSuffix(got, "\n0") {
		t.Errorf("the default paths are not what counts: %q", got)
	}
	b.Exec(id, "touch", "/tmp/x")
	if out, code := tryExec(t, b.Daemon, id, "sh", "-c", "echo x >/proc/sys/kernel/domainname"); code == 0 {
		t.Errorf("/proc/sys is writable: %s", out)
	}
	c = b.sleeper("profile")
	c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "mine"}
	b.refused(c, codes.FailedPrecondition, "AppArmor", "mine")
	// Without the switches the same request means what it says.
	b = newBox(t)
	c = b.sleeper("labelled")
	c.Linux.SecurityContext.MaskedPaths = []string{"/proc/meminfo"}
	c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Type: "container_t"}
	if got := sh(b.Daemon, b.run(c), "wc -c </proc/meminfo"); got != "0" {
		t.Errorf("without disable_proc_mount %q", got)
	}
}

// TestSEC_01_CVE_2022_24769: the inheritable set is empty, of a container and
// of its commands, whatever was added, and also with a base specification that
// fills it.
func TestSEC_01_CVE_2022_24769(t *testing.T) {
	t.Parallel()
	base := filepath.Join(t.TempDir(), "base.json")
	caps := `["CAP_CHOWN","CAP_SYS_ADMIN"]`
	text := `{"process":{"capabilities":{"bounding":` + caps + `,"effective":` + caps + `,"permitted":` + caps + `,"inheritable":` + caps + `,"ambient":` + caps + `}}}`
	if err := os.WriteFile(base, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	handler := func(key string) []string { return []string{"containerd", "runtimes", "special", key} }
	d := start(t, runtimeKey("io.containerd.runc.v2", handler("runtime_type")...), runtimeKey(base, handler("base_runtime_spec")...))
	config := d.PodConfig("special")
	privileged(config)
	b := &box{Daemon: d, t: t, image: plain(t, d), config: config, pod: d.RunPodWith(config, "special")}
	added := b.sleeper("added")
	added.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"ALL"}}
	for _, c := range []*cri.ContainerConfig{b.sleeper("plain"), added, b.privilegedSleeper("privileged")} {
		id := b.run(c)
		for who, text := range map[string]string{"container": b.procStatus(id), "command": d.Exec(id, "cat", "/proc/self/status")} {
			if inh, amb := capsOf(t, text, "CapInh"), capsOf(t, text, "CapAmb"); inh|amb != 0 {
				t.Errorf("%s, %s: inheritable %x, ambient %x", c.Metadata.Name, who, inh, amb)
			}
		}
	}
}

// TestSEC_36_CVE_2026_41579_CVE_2023_27561: an image whose /proc, /sys or /dev
// are links leads nothing of the host's anywhere: the container is refused, or
// has the kernel's file systems in their places.
func TestSEC_36_CVE_2026_41579_CVE_2023_27561(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	outside := t.TempDir()
	for _, dir := range []string{"proc", "sys", "dev"} {
		for kind, target := range map[string]string{"absolute": outside, "inside": "/etc", "up": "../../../../../.." + outside} {
			name := dir + "-" + kind
			ref := image(t, b.Daemon, images.Spec{Layers: [][]images.File{{images.Whiteout(dir)}, {images.Symlink(dir, target)}}})
			id, err := b.create(daemon.ContainerConfig(name, ref))
			if err == nil {
				err = b.start(id)
			}
			if err != nil {
				continue
			}
			mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", b.begun(id)))
			if err != nil {
				t.Fatal(err)
			}
			if kind := map[string]string{"proc": " proc ", "sys": " sysfs ", "dev": ",size=65536k,"}[dir]; !strings.Contains(string(mounts), kind) {
				t.Errorf("%s runs without its kernel file system:\n%s", name, mounts)
			}
			b.stop(id, 0)
		}
	}
	left, err := os.ReadDir(outside)
	if err != nil || len(left) != 0 {
		t.Errorf("outside are %v, %v", left, err)
	}
}

// TestPOD_10_CVE_2022_0811: no sysctl smuggles in another one.
func TestPOD_10_CVE_2022_0811(t *testing.T) {
	t.Parallel()
	d := shared(t)
	before, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"net.core.somaxconn":                      "1+kernel.core_pattern=|/evil",
		"net.core.somaxconn+kernel.core_pattern":  "1",
		"net.core.somaxconn=1":                    "1",
		"net.core.somaxconn\nkernel.core_pattern": "|/evil",
		"net/../kernel/core_pattern":              "|/evil",
		"kernel.core_pattern":                     "|/evil",
	} {
		config := d.PodConfig("smuggler")
		config.Linux.Sysctls = map[string]string{name: value}
		if _, err := d.StartPod(t.Context(), config, ""); err == nil || !strings.Contains(err.Error(), "InvalidArgument") || !strings.Contains(err.Error(), "sysctl") {
			t.Errorf("%q: %v", name, err)
		}
	}
	if after, err := os.ReadFile("/proc/sys/kernel/core_pattern"); err != nil || !bytes.Equal(before, after) {
		t.Errorf("kernel.core_pattern was %q and is %q, %v", before, after, err)
	}
}

// labelOf is the SELinux label of a process, "" where the kernel has none.
func labelOf(pid int) string {
	if !exists("/sys/fs/selinux/enforce") {
		return ""
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", pid))
	if err != nil {
		return err.Error()
	}
	return strings.Trim(string(text), "\x00\n")
}

// specLabels are the labels in the specification of a container.
func specLabels(t *testing.T, d *daemon.Daemon, id string) (process, mount string) {
	t.Helper()
	resp, err := d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
	var info struct {
		RuntimeSpec struct {
			Process struct{ SelinuxLabel string }
			Linux   struct{ MountLabel string }
		}
	}
	if err == nil {
		err = json.Unmarshal([]byte(resp.Info["info"]), &info)
	}
	if err != nil {
		t.Fatal(err)
	}
	return info.RuntimeSpec.Process.SelinuxLabel, info.RuntimeSpec.Linux.MountLabel
}

// TestSEC_21_SELinuxLabels: with SELinux each pod has a level of its own, which
// its containers share; without it everything that asks for labels runs, and
// nothing has one.
func TestSEC_21_SELinuxLabels(t *testing.T) {
	t.Parallel()
	d := start(t, runtimeKey(true, "enable_selinux"))
	seen := map[string]bool{}
	for i := range 2 {
		b := &box{Daemon: d, t: t, image: plain(t, d)}
		p := runPod(d, fmt.Sprint("labelled-", i))
		b.pod, b.config = p.id, p.config
		volume := t.TempDir()
		c := b.sleeper("app")
		c.Mounts = []*cri.Mount{{HostPath: volume, ContainerPath: "/volume", SelinuxRelabel: true}}
		id := b.run(c)
		b.Exec(id, "touch", "/volume/x", "/dev/shm/x", "/x", "/etc/hosts")
		typed := b.sleeper("typed")
		typed.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Type: "container_t"}
		process, mount := specLabels(t, d, id)
		other, _ := specLabels(t, d, b.run(typed))
		if labelOf(b.pid(id)) != process || process != other || (process == "") != (labelOf(os.Getpid()) == "") || (mount == "") != (process == "") {
			t.Errorf("labels %q and %q, of another container %q, of the process %q", process, mount, other, labelOf(b.pid(id)))
		}
		if process != "" && seen[process] {
			t.Errorf("two pods have %s", process)
		}
		seen[process] = true
	}
	d.Restart()
	runPod(d, "after-restart")
}

// TestSEC_25_KVMLabel: a handler of virtual machines runs its pods also where
// there is no label to give. Which one it is a key says, or the runtime's type.
func TestSEC_25_KVMLabel(t *testing.T) {
	t.Parallel()
	set := func(handler, key string, value any) daemon.Option {
		return runtimeKey(value, "containerd", "runtimes", handler, key)
	}
	shim := shimNamed(t, "containerd-shim-kata-v2")
	d := start(t, runtimeKey(true, "enable_selinux"),
		set("special", "runtime_type", "io.containerd.runc.v2"), set("special", "selinux_kvm", true),
		set("kata", "runtime_type", "io.containerd.kata.v2"), set("kata", "runtime_path", shim),
		set("plain-kata", "runtime_type", "io.containerd.kata.v2"), set("plain-kata", "runtime_path", shim), set("plain-kata", "selinux_kvm", false))
	for _, handler := range []string{"special", "kata"} {
		config := d.PodConfig(handler)
		b := &box{Daemon: d, t: t, image: plain(t, d), config: config, pod: d.RunPodWith(config, handler)}
		id := b.run(b.sleeper("app"))
		process, _ := specLabels(t, d, id)
		if on := labelOf(os.Getpid()) != ""; on != strings.Contains(process, ":container_kvm_t:") {
			t.Errorf("%s: the label is %q", handler, process)
		}
		for who, pid := range map[string]int{"sandbox": pidOf(t, d, b.pod), "container": b.begun(id)} {
			if got := labelOf(pid); got != process {
				t.Errorf("%s: the %s has %q, want %q", handler, who, got, process)
			}
		}
	}
	// Of other handlers, in the same daemon.
	for _, handler := range []string{pausing, "plain-kata"} {
		id := d.RunPodWith(d.PodConfig("plain"+handler), handler)
		if got := labelOf(pidOf(t, d, id)); strings.Contains(got, "kvm") {
			t.Errorf("a pod of handler %q that is no virtual machine has %q", handler, got)
		}
	}
}

// shimNamed is runc's shim under another name.
func shimNamed(t *testing.T, name string) string {
	t.Helper()
	link := filepath.Join(t.TempDir(), name)
	if err := os.Symlink(built(t, "containerd-shim-runc-v2"), link); err != nil {
		t.Fatal(err)
	}
	return link
}

// TestPOD_18_SandboxSELinux: what a pod asks for is its containers' too.
func TestPOD_18_SandboxSELinux(t *testing.T) {
	t.Parallel()
	d := start(t, runtimeKey(true, "enable_selinux"))
	b := &box{Daemon: d, t: t, image: plain(t, d)}
	p := runPod(d, "labelled", func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Level: "s0:c7,c8"}
	})
	b.pod, b.config = p.id, p.config
	process, _ := specLabels(t, d, b.run(b.sleeper("app")))
	if on := labelOf(os.Getpid()) != ""; on != strings.HasSuffix(process, ":s0:c7,c8") {
		t.Errorf("the label is %q", process)
	}
}

// TestSEC_19_AppArmorDefault: with AppArmor the default profile is loaded and
// in force; without it a pod that asks for it just runs.
func TestSEC_19_AppArmorDefault(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.sleeper("app")
	c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	id := b.run(c)
	if exists("/sys/kernel/security/apparmor/profiles") {
		if got := sh(b.Daemon, id, "cat /proc/self/attr/current"); !strings.HasPrefix(got, "cri-containerd.apparmor.d (enforce)") {
			t.Errorf("the profile is %q", got)
		}
	}
	b.Exec(id, "true")
	b.stop(id, 0)
}

// TestSEC_20_AppArmorLocalhost: a profile that is not loaded, or that nothing
// could enforce, refuses the container; none at all is none.
func TestSEC_20_AppArmorLocalhost(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.sleeper("absent")
	c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "gantry-no-such-profile"}
	b.refused(c, codes.FailedPrecondition, "AppArmor", "gantry-no-such-profile")
	c = b.sleeper("unconfined")
	c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
	b.Exec(b.run(c), "true")
}
