package spec

import (
	"bytes"
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxNodeMounts bounds the lines of a file of mounts.
const maxNodeMounts = 256

// ParseMountsFile reads a file of mounts for every container: "/SRC:/DST" a
// line, or "/SRC" for the same path inside, comments after #.
func ParseMountsFile(name string, content []byte) (list []*cri.Mount, err error) {
	n := 0
	for line := range bytes.Lines(content) {
		n++
		text, _, _ := strings.Cut(string(line), "#")
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		source, destination, two := strings.Cut(text, ":")
		if !two {
			destination = source
		}
		if !nodePath(source) || !nodePath(destination) || path.Clean(destination) == "/" || len(list) == maxNodeMounts {
			return nil, fmt.Errorf("%s:%d: %.256q is not one of at most %d mounts as /SRC:/DST: %w", name, n, text, maxNodeMounts, errdefs.ErrInvalidArgument)
		}
		list = append(list, &cri.Mount{HostPath: source, ContainerPath: path.Clean(destination), Readonly: true})
	}
	return list, nil
}

func nodePath(p string) bool { return path.IsAbs(p) && !hasControl(p) && !strings.Contains(p, ":") }
