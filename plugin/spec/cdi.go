package spec

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/parser"
)

const (
	// cdiPrefix begins the annotations in which device plugins named devices
	// before the CRI had a field for them.
	cdiPrefix = "cdi.k8s.io/"
	// maxCDI bounds the devices of one container.
	maxCDI = 1024
)

// CDIDevices returns the names of the CDI devices that a request asks for, in
// its field and in its annotations, each once. Only a request names devices:
// annotations of an image or of a specification are not looked at.
func CDIDevices(cfg *cri.ContainerConfig) ([]string, error) {
	var names []string
	add := func(field, name string) error {
		if _, _, _, err := parser.ParseQualifiedName(name); err != nil {
			return fmt.Errorf("%s: %.256q is not vendor/class=name: %w", field, name, errdefs.ErrInvalidArgument)
		}
		if len(names) == maxCDI {
			return fmt.Errorf("%s: more than %d devices: %w", field, maxCDI, errdefs.ErrInvalidArgument)
		}
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
		return nil
	}
	for i, d := range cfg.GetCDIDevices() {
		if err := add(fmt.Sprintf("config.CDI_devices[%d].name", i), d.GetName()); err != nil {
			return nil, err
		}
	}
	for _, key := range slices.Sorted(maps.Keys(cfg.GetAnnotations())) {
		if !strings.HasPrefix(key, cdiPrefix) {
			continue
		}
		for name := range strings.SplitSeq(cfg.GetAnnotations()[key], ",") {
			if err := add(fmt.Sprintf("config.annotations[%q]", key), name); err != nil {
				return nil, err
			}
		}
	}
	return names, nil
}
