package images

import (
	"archive/tar"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// TestBuild: the images are sound, have what was asked for, and are the same
// each time.
func TestBuild(t *testing.T) {
	spec := Spec{
		Env: []string{"A=b"}, User: "alice", WorkingDir: "/tmp", StopSignal: "SIGUSR1",
		Volumes: []string{"/data"}, Entrypoint: []string{"/bin/echo"}, Ports: []string{"80/tcp"},
		Layers: [][]File{{Text("a", "lower"), Text("b", "lower")}, {Whiteout("a"), Hardlink("c", "b")}},
	}
	img, err := Build(spec)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Build(spec)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := digest(t, img), digest(t, again); a != b {
		t.Errorf("the same spec gives %s and %s", a, b)
	}
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c := file.Config
	if c.User != "alice" || c.WorkingDir != "/tmp" || c.StopSignal != "SIGUSR1" || len(c.Cmd) != 0 ||
		!slices.Contains(c.Env, "A=b") || len(file.RootFS.DiffIDs) != 3 || len(c.Volumes) != 1 || len(c.ExposedPorts) != 1 {
		t.Errorf("config is %+v", file)
	}
	if plain := MustBuild(Spec{}); digest(t, plain) == digest(t, img) {
		t.Error("a spec makes no difference")
	} else if file, err := plain.ConfigFile(); err != nil || !slices.Equal(file.Config.Cmd, Sleep) {
		t.Errorf("plain image has no command: %+v, %v", file, err)
	}
}

// TestContent: what the flattened image holds.
func TestContent(t *testing.T) {
	img := MustBuild(Spec{Layers: [][]File{{Text("a", "1"), Text("b", "2")}, {Whiteout("a")}}})
	r := mutate.Extract(img)
	defer r.Close()
	found := map[string]string{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		found[strings.TrimSuffix(h.Name, "/")] = string(text)
	}
	for _, want := range []string{"bin/sh", "bin/sleep", "bin/httpd", "bin/nc", "bin/stty", "etc/passwd", "tmp", "b"} {
		if _, ok := found[want]; !ok {
			t.Errorf("%s is not in %d entries", want, len(found))
		}
	}
	if _, ok := found["a"]; ok {
		t.Errorf("the whiteout left %q", slices.Sorted(maps.Keys(found)))
	}
	if !strings.Contains(found["etc/passwd"], "alice:x:1000:1000:") || !strings.Contains(found["etc/group"], "crew:x:3000:alice") {
		t.Errorf("accounts:\n%s%s", found["etc/passwd"], found["etc/group"])
	}
}

func TestServe(t *testing.T) {
	img := MustBuild(Spec{Layers: [][]File{{Text("a", "1")}}})
	text := Serve(t).Push(t, "some/app:v1", img)
	ref, err := name.ParseReference(text, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	pulled, err := remote.Image(ref, remote.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(pulled); err != nil {
		t.Error(err)
	}
	if a, b := digest(t, img), digest(t, pulled); a != b {
		t.Errorf("pushed %s, pulled %s", a, b)
	}
}

func digest(t *testing.T, img v1.Image) string {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}
