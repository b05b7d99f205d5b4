package lifecycle

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

func TestCTR_01_NameAndAttempt(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.sleeper("app")
	c.Metadata.Attempt = 3
	id := b.run(c)
	if m := b.status(id).Metadata; m.Name != "app" || m.Attempt != 3 {
		t.Errorf("metadata is %v", m)
	}
	_, err := b.create(c)
	wantError(t, err, codes.AlreadyExists, "app")
	c.Metadata.Attempt = 4
	if again := b.mustCreate(c); again == id {
		t.Errorf("attempt 4 has the ID of attempt 3")
	}
	other := newBox(t)
	if _, err := other.create(c); err != nil {
		t.Errorf("the same name in another pod: %v", err)
	}
	if _, err := b.create(daemon.ContainerConfig("", b.image)); err == nil {
		t.Error("a container without a name was made")
	}
}

// TestCTR_02_ImageReference: an image is found by every name it has.
func TestCTR_02_ImageReference(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	img := images.MustBuild(images.Spec{Env: []string{"WHICH=forms"}})
	ref := pulledImage(t, b.Daemon, "forms:latest", img)
	id := mustPull(t, b.Daemon, ref)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	repo := strings.TrimSuffix(ref, ":latest")
	for name, form := range map[string]string{
		"id": id, "bare-id": strings.TrimPrefix(id, "sha256:"), "tag": ref, "no-tag": repo, "digest": repo + "@" + digest.String(),
	} {
		cid := b.run(daemon.ContainerConfig(name, form))
		if got := sh(b.Daemon, cid, "echo $WHICH"); got != "forms" {
			t.Errorf("image %s: WHICH is %q", form, got)
		}
		if got := b.status(cid).ImageId; got != id {
			t.Errorf("image %s has ID %s, want %s", form, got, id)
		}
	}
	b.refused(daemon.ContainerConfig("absent", repo+":absent"), codes.NotFound, "absent")
}

func TestCTR_03_UserSpecifiedImage(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.sleeper("app")
	c.Image.Image, c.Image.UserSpecifiedImage = mustPull(t, b.Daemon, b.image), "words.of/the/user:v1"
	id := b.mustCreate(c)
	if got := b.status(id).Image.UserSpecifiedImage; got != "words.of/the/user:v1" {
		t.Errorf("status has user_specified_image %q", got)
	}
	var info struct {
		RuntimeSpec struct{ Annotations map[string]string }
	}
	b.info(id, &info)
	if got := info.RuntimeSpec.Annotations["io.kubernetes.cri.image-name"]; got != "words.of/the/user:v1" {
		t.Errorf("the bundle's annotation of the image is %q", got)
	}
}

// argv is an image in which /bin/argv tells with what arguments it was called.
func argv(t *testing.T, entrypoint, cmd []string) v1.Image {
	t.Helper()
	img := images.MustBuild(images.Spec{Layers: [][]images.File{{
		images.Executable("bin/argv", []byte("#!/bin/sh\nprintf '[%s]' \"$@\"\n")),
	}}})
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file = file.DeepCopy()
	file.Config.Entrypoint, file.Config.Cmd = entrypoint, cmd
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	return img
}

// TestCTR_07_CommandAndArgs: a command replaces both parts of the image, args
// alone replace its cmd, and nothing at all is an error.
func TestCTR_07_CommandAndArgs(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	word := func(w string) []string { return []string{"/bin/argv", w} }
	for _, row := range []struct {
		entrypoint, cmd, command, args string
		want                           string
	}{
		{"", "", "", "", ""},
		{"", "", "", "a", "[a]"},
		{"", "", "c", "", "[c]"},
		{"", "", "c", "a", "[c][/bin/argv][a]"},
		{"", "C", "", "", "[C]"},
		{"", "C", "", "a", "[a]"},
		{"", "C", "c", "", "[c]"},
		{"", "C", "c", "a", "[c][/bin/argv][a]"},
		{"E", "", "", "", "[E]"},
		{"E", "", "", "a", "[E][/bin/argv][a]"},
		{"E", "", "c", "", "[c]"},
		{"E", "", "c", "a", "[c][/bin/argv][a]"},
		{"E", "C", "", "", "[E][/bin/argv][C]"},
		{"E", "C", "", "a", "[E][/bin/argv][a]"},
		{"E", "C", "c", "", "[c]"},
		{"E", "C", "c", "a", "[c][/bin/argv][a]"},
	} {
		part := func(w string) []string {
			if w == "" {
				return nil
			}
			return word(w)
		}
		tag := "argv:" + strings.ToLower("x"+row.entrypoint+row.cmd)
		c := daemon.ContainerConfig("c-"+strings.ReplaceAll(row.entrypoint+"."+row.cmd+"."+row.command+"."+row.args, "..", ".-."), "")
		c.Image.Image = pulledImage(t, b.Daemon, tag, argv(t, part(row.entrypoint), part(row.cmd)))
		c.Command, c.Args = part(row.command), part(row.args)
		if row.want == "" {
			b.refused(c, codes.InvalidArgument, "command")
			continue
		}
		if got := strings.TrimSuffix(b.output(c), "\n"); got != row.want {
			t.Errorf("%+v runs %s", row, got)
		}
	}
}

func TestCTR_08_WorkingDir(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	ref := image(t, b.Daemon, images.Spec{WorkingDir: "/home"})
	for name, row := range map[string]struct{ image, dir, want string }{
		"default":    {b.image, "", "/"},
		"image":      {ref, "", "/home"},
		"override":   {ref, "/tmp", "/tmp"},
		"missing":    {b.image, "/made/for/me", "/made/for/me"},
		"unreadable": {ref, "/root", "/root"},
	} {
		c := daemon.ContainerConfig(name, row.image, "pwd")
		c.WorkingDir = row.dir
		if got := strings.TrimSpace(b.output(c)); got != row.want {
			t.Errorf("%s: pwd is %q, want %q", name, got, row.want)
		}
	}
}

// environ is the environment of the first process.
func (b *box) environ(id string) []string {
	b.t.Helper()
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", b.begun(id)))
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(env), "\x00"), "\x00")
}

// env makes variables of names and values in turn.
func env(pairs ...string) []*cri.KeyValue {
	var out []*cri.KeyValue
	for pair := range slices.Chunk(pairs, 2) {
		out = append(out, &cri.KeyValue{Key: pair[0], Value: []byte(pair[1])})
	}
	return out
}

func TestCTR_09_Envs(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	ref := image(t, b.Daemon, images.Spec{Env: []string{"BOTH=image", "ONLY_IMAGE=yes", "EMPTY="}})
	c := daemon.ContainerConfig("app", ref, "sleep", "1000")
	odd := "two\nlines, a=b, \t tab, $(no) `no` ünïcode \x01"
	c.Envs = env("BOTH", "cri", "TWICE", "first", "TWICE", "last", "ODD", odd, "NONE", "")
	id := b.run(c)
	want := map[string]string{
		"BOTH": "cri", "ONLY_IMAGE": "yes", "EMPTY": "", "TWICE": "last", "ODD": odd, "NONE": "",
		"HOSTNAME": "pod-host", "PATH": "/usr/local/bin:/usr/bin:/bin",
	}
	check := func(what string, env []string) {
		t.Helper()
		got := map[string]string{}
		for _, kv := range env {
			k, v, _ := strings.Cut(kv, "=")
			if _, twice := got[k]; twice {
				t.Errorf("%s: %s is there twice: %q", what, k, env)
			}
			got[k] = v
		}
		for k, v := range want {
			if g, ok := got[k]; !ok || g != v {
				t.Errorf("%s: %s is %q, want %q", what, k, g, v)
			}
		}
	}
	check("process", b.environ(id))
	check("exec", strings.Split(strings.TrimSuffix(b.Exec(id, "cat", "/proc/self/environ"), "\x00"), "\x00"))

	bare, err := mutate.Config(images.MustBuild(images.Spec{}), v1.Config{})
	if err != nil {
		t.Fatal(err)
	}
	c = daemon.ContainerConfig("bare", pulledImage(t, b.Daemon, "bare:1", bare), "/bin/sleep", "1000")
	got := b.environ(b.run(c))
	if !slices.ContainsFunc(got, func(kv string) bool {
		return strings.HasPrefix(kv, "PATH=") && strings.Contains(kv, "/bin")
	}) {
		t.Errorf("an image without PATH gets %q", got)
	}
}

// TestCTR_10_HomeAndTerm: HOME is that of the user in the image, TERM is set
// where there is a terminal.
func TestCTR_10_HomeAndTerm(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	environ := func(name string, edit func(*cri.ContainerConfig)) []string {
		c := b.sleeper(name)
		c.Command = []string{"sleep", "1000"}
		edit(c)
		return b.environ(b.run(c))
	}
	asUser := func(uid int64) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: uid} }
	}
	for name, row := range map[string]struct {
		edit func(*cri.ContainerConfig)
		want string
	}{
		"root":    {func(*cri.ContainerConfig) {}, "HOME=/root"},
		"name":    {func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = images.Bob }, "HOME=/home/bob"},
		"number":  {asUser(images.AliceUID), "HOME=/home/alice"},
		"nobody":  {asUser(4242), "HOME=/"},
		"request": {func(c *cri.ContainerConfig) { c.Envs = env("HOME", "/elsewhere") }, "HOME=/elsewhere"},
		"tty":     {func(c *cri.ContainerConfig) { c.Tty = true }, "TERM=xterm"},
	} {
		if got := environ(name, row.edit); !slices.Contains(got, row.want) {
			t.Errorf("%s: no %s in %q", name, row.want, got)
		}
	}
	if got := environ("no-tty", func(*cri.ContainerConfig) {}); slices.Contains(got, "TERM=xterm") {
		t.Errorf("without a terminal: %q", got)
	}
	passwd := "root:x:0:0:root:/root:/bin/sh\nevil:x:66:66::/home\nA=B:/bin/sh\n"
	ref := image(t, b.Daemon, images.Spec{Layers: [][]images.File{{images.Text("etc/passwd", passwd)}}})
	c := daemon.ContainerConfig("newline", ref, "sleep", "1000")
	c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 66}
	if id, err := b.create(c); err == nil && b.start(id) == nil {
		if got := b.environ(id); slices.Contains(got, "A=B") || slices.Contains(got, "A=B:/bin/sh") {
			t.Errorf("a line of passwd became a variable: %q", got)
		}
	}
}

func TestCTR_11_LabelsAndAnnotations(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.sleeper("app")
	maps.Copy(c.Labels, map[string]string{"app": "web", "empty": "", "example.com/long": strings.Repeat("x", 3000)})
	c.Annotations = map[string]string{"note": "several\nlines \"quoted\"", "json": `{"a":[1,2]}`, "big": strings.Repeat("y", 64<<10)}
	id := b.mustCreate(c)
	b.mustCreate(b.sleeper("other"))
	s := b.status(id)
	if !maps.Equal(s.Labels, c.Labels) || !maps.Equal(s.Annotations, c.Annotations) {
		t.Errorf("status has labels %.300v and annotations %.300v", s.Labels, s.Annotations)
	}
	list, err := b.Runtime().ListContainers(t.Context(), &cri.ListContainersRequest{
		Filter: &cri.ContainerFilter{PodSandboxId: b.pod, LabelSelector: map[string]string{"app": "web", "empty": ""}},
	})
	if err != nil || len(list.Containers) != 1 {
		t.Fatalf("by label: %v, %v", list, err)
	}
	if l := list.Containers[0]; l.Id != id || !maps.Equal(l.Labels, c.Labels) || !maps.Equal(l.Annotations, c.Annotations) {
		t.Errorf("list has %s with labels %.300v and annotations %.300v", l.Id, l.Labels, l.Annotations)
	}
}

func TestCTR_12_LogPath(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.script("app", "echo hello")
	c.LogPath = "app/0.log"
	if err := os.Mkdir(filepath.Join(b.config.LogDirectory, "app"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := b.exited(b.run(c))
	if want := filepath.Join(b.config.LogDirectory, "app/0.log"); s.LogPath != want {
		t.Errorf("log path is %q, want %q", s.LogPath, want)
	}
	if got := logText(t, s.LogPath, "stdout"); got != "hello\n" {
		t.Errorf("the log says %q", got)
	}
	c = b.script("silent", "i=0; while [ $i -lt 5000 ]; do echo much output that nobody wants; i=$((i+1)); done")
	c.LogPath = ""
	if s = b.exited(b.run(c)); s.LogPath != "" || s.ExitCode != 0 {
		t.Errorf("without a log: path %q, exit code %d", s.LogPath, s.ExitCode)
	}
	files, err := filepath.Glob(b.config.LogDirectory + "/*")
	if err != nil || len(files) != 1 {
		t.Errorf("in the log directory are %q, %v", files, err)
	}
}

// TestCTR_25_VerboseInfo: the verbose status is JSON and tells the truth.
func TestCTR_25_VerboseInfo(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	var info struct {
		SandboxID   string `json:"sandboxID"`
		Pid         int    `json:"pid"`
		Snapshotter string `json:"snapshotter"`
		RuntimeSpec struct {
			Process  struct{ Args []string }
			Hostname string
		} `json:"runtimeSpec"`
	}
	b.info(id, &info)
	if info.SandboxID != b.pod || info.Snapshotter == "" || !slices.Equal(info.RuntimeSpec.Process.Args, images.Sleep) {
		t.Errorf("info is %+v", info)
	}
	if want := b.pid(id); info.Pid != want {
		t.Errorf("pid %d, want %d", info.Pid, want)
	}
	resp, err := b.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil || len(resp.Info) != 0 {
		t.Errorf("info %v, %v without asking for it", resp.GetInfo(), err)
	}
}

// info decodes the verbose information about a container.
func (b *box) info(id string, into any) {
	b.t.Helper()
	resp, err := b.Runtime().ContainerStatus(context.Background(), &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		b.t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(resp.Info["info"]), into); err != nil {
		b.t.Fatalf("info %.500q: %v", resp.Info, err)
	}
}
