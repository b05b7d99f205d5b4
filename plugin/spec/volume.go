package spec

import (
	"fmt"
	"path"
	"slices"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxDeclared bounds the volumes that an image declares. Real ones have a few.
const maxDeclared = 256

// DeclaredVolumes are the places at which a container gets a directory of its
// own because its image declares a volume there: sorted, as absolute paths of
// the container.
//
// A mount that was asked for wins, with all that is below it: data that was meant
// for it must not end up in a directory that goes with the container. What the
// runtime mounts from the kernel wins too, and the root cannot be a volume.
func DeclaredVolumes(asked []*cri.Mount, image imagespec.ImageConfig, p Policy) ([]string, error) {
	if p.IgnoreImageVolumes {
		return nil, nil
	}
	var list []string
	for v := range image.Volumes {
		v = path.Clean("/" + v)
		taken := v == "/" || slices.ContainsFunc(kernelDirs, func(d string) bool { return covers(d, v) }) ||
			slices.ContainsFunc(asked, func(m *cri.Mount) bool { return covers(path.Clean(m.GetContainerPath()), v) })
		if !taken {
			list = append(list, v)
		}
	}
	slices.Sort(list)
	list = slices.Compact(list)
	if len(list) > maxDeclared {
		return nil, fmt.Errorf("the image declares %d volumes, more than %d: %w", len(list), maxDeclared, errdefs.ErrFailedPrecondition)
	}
	return list, nil
}

// kernelDirs hold the kernel's filesystems.
var kernelDirs = []string{"/proc", devDir, sysDir}
