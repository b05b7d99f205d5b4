package cli

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/containerd/containerd/v2/version"
	"github.com/spf13/cobra"
)

// versions is what this program was made of.
type versions struct {
	Gantry     string `json:"gantry"`
	Containerd string `json:"containerd"`
	Revision   string `json:"revision,omitempty"`
	CRI        string `json:"cri"`
	Go         string `json:"go"`
	Platform   string `json:"platform"`
}

func (a *app) version() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the versions this program was made of",
		Long: `Prints the version of gantry, of the containerd it is made for, of the CRI it
serves and of the Go it was built with. It does not ask the daemon; gantry check
shows what that says of itself.
` + exitHelp,
		Example: `  gantry version
  gantry version --output json | jq -r .gantry`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			v := readVersions()
			return a.show(v, v.text)
		},
	}
}

func readVersions() versions {
	// The build writes 2.4.2+gantry.0.1.0.
	daemon, own, released := strings.Cut(version.Version, "+gantry.")
	if !released {
		own = "unreleased"
	}
	v := versions{Gantry: own, Containerd: daemon, Revision: version.Revision, CRI: "unknown", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	for _, m := range info.Deps {
		if m.Path == "k8s.io/cri-api" {
			v.CRI = "v1 (cri-api " + m.Version + ")"
		}
	}
	return v
}

func (v versions) text(w io.Writer) error {
	_, err := fmt.Fprintf(w, "gantry      %s\ncontainerd  %s\nrevision    %s\nCRI         %s\ngo          %s\nplatform    %s\n",
		v.Gantry, v.Containerd, v.Revision, v.CRI, v.Go, v.Platform)
	return err
}
