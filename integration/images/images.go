// Package images makes the images that tests run, on the spot and from nothing
// but the machine's static busybox, and hands them to a daemon: over a loopback
// registry (Serve) or straight into its stores (Import).
//
//	img := images.MustBuild(images.Spec{Env: []string{"A=b"}, User: "alice"})
//	reg := images.Serve(t)
//	ref := reg.Push(t, "app:v1", img)
//
// Equal specs give equal images, digest included. Every image has a command:
// tests start containers that give none. Registries with faults are elsewhere;
// this one only serves.
package images

import (
	"fmt"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Sleep is the command of an image that names none: it runs until it is told to
// stop, and obeys SIGTERM though it is PID 1.
var Sleep = []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000000 & wait $!; done"}

// Users that every image knows beside root and nobody; Group is a further group
// of Alice's.
const (
	Alice    = "alice"
	AliceUID = 1000
	Bob      = "bob"
	BobUID   = 2000
	Group    = "crew"
	GroupGID = 3000
)

// Epoch is the time of everything in an image.
var Epoch = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// Spec says in what an image differs from the plain one.
type Spec struct {
	// Entrypoint and Cmd as in a Dockerfile. With neither, Cmd is Sleep.
	Entrypoint, Cmd []string
	// Env is added after PATH.
	Env []string
	// User is name, uid, name:group or uid:gid.
	User       string
	WorkingDir string
	StopSignal string
	Volumes    []string
	Labels     map[string]string
	// Ports as in EXPOSE: "80/tcp".
	Ports []string
	// Layers are put over the base, the first lowest.
	Layers [][]File
}

// Build makes an image for this machine's platform.
func Build(spec Spec) (v1.Image, error) {
	img, err := base()
	if err != nil {
		return nil, err
	}
	for _, files := range spec.Layers {
		layer, err := Layer(files)
		if err != nil {
			return nil, fmt.Errorf("build image: %w", err)
		}
		if img, err = mutate.Append(img, addendum(layer, "files")); err != nil {
			return nil, fmt.Errorf("build image: %w", err)
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("build image: %w", err)
	}
	file = file.DeepCopy()
	spec.apply(&file.Config)
	if img, err = mutate.ConfigFile(img, file); err != nil {
		return nil, fmt.Errorf("build image: %w", err)
	}
	return img, nil
}

// MustBuild is Build for specs that stand in a test's text.
func MustBuild(spec Spec) v1.Image {
	img, err := Build(spec)
	if err != nil {
		panic(err)
	}
	return img
}

func (s Spec) apply(c *v1.Config) {
	c.Env = append([]string{"PATH=/usr/local/bin:/usr/bin:/bin"}, s.Env...)
	c.Entrypoint, c.Cmd = s.Entrypoint, s.Cmd
	if len(c.Entrypoint) == 0 && len(c.Cmd) == 0 {
		c.Cmd = Sleep
	}
	c.User, c.WorkingDir, c.StopSignal, c.Labels = s.User, s.WorkingDir, s.StopSignal, s.Labels
	c.Volumes, c.ExposedPorts = set(s.Volumes), set(s.Ports)
}

func set(names []string) map[string]struct{} {
	if len(names) == 0 {
		return nil
	}
	m := make(map[string]struct{}, len(names))
	for _, n := range names {
		m[n] = struct{}{}
	}
	return m
}

func addendum(layer v1.Layer, by string) mutate.Addendum {
	return mutate.Addendum{
		Layer:     layer,
		MediaType: types.OCILayer,
		History:   v1.History{Created: v1.Time{Time: Epoch}, CreatedBy: by},
	}
}

// base is the one layer below all images.
var base = sync.OnceValues(func() (v1.Image, error) {
	files, err := baseFiles()
	if err != nil {
		return nil, fmt.Errorf("build base image: %w", err)
	}
	layer, err := Layer(files)
	if err != nil {
		return nil, fmt.Errorf("build base image: %w", err)
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if img, err = mutate.Append(img, addendum(layer, "busybox")); err != nil {
		return nil, fmt.Errorf("build base image: %w", err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("build base image: %w", err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Created = "linux", architecture, v1.Time{Time: Epoch}
	return mutate.ConfigFile(img, file)
})

// passwd and group of every image.
var (
	passwd = strings.Join([]string{
		"root:x:0:0:root:/root:/bin/sh",
		"nobody:x:65534:65534:nobody:/nonexistent:/bin/false",
		fmt.Sprintf("%s:x:%d:%[2]d::/home/%[1]s:/bin/sh", Alice, AliceUID),
		fmt.Sprintf("%s:x:%d:%[2]d::/home/%[1]s:/bin/sh", Bob, BobUID),
		"",
	}, "\n")
	group = strings.Join([]string{
		"root:x:0:",
		"nogroup:x:65534:",
		fmt.Sprintf("%s:x:%d:", Alice, AliceUID),
		fmt.Sprintf("%s:x:%d:", Bob, BobUID),
		fmt.Sprintf("%s:x:%d:%s", Group, GroupGID, Alice),
		"",
	}, "\n")
)
