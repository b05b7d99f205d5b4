// Package lifecycle holds the black-box tests of pods, containers, images,
// streams and logs: one test per row of the feature inventory, named after it,
// against a real daemon over its socket.
//
// With GANTRY_STOCK=1 the same tests run against containerd as released, which
// tells a wrong test from a wrong daemon. With GANTRY_HANDLER=runc pods run by
// containerd's shim and have pause processes where a test does not say otherwise; with
// crun they run by our shim with crun, with own-old-runc by it with Debian's runc. Both
// variables together have stock containerd run pods by our shim: as handler gantry with
// pause processes, as pinned without. Start reading at helpers_test.go.
package lifecycle

import (
	"cmp"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// defaultHandler runs the pods of tests that ask for none.
var defaultHandler = cmp.Or(os.Getenv("GANTRY_HANDLER"), "gantry")

// ownTable names the table of the configuration that has the settings of the handler
// under test: gantry's own has those of runc.
func ownTable() string {
	if defaultHandler == "gantry" && !stock {
		return "runc"
	}
	return defaultHandler
}

// stock says that the daemon under test is containerd's own.
var stock = os.Getenv("GANTRY_STOCK") != ""

func TestMain(m *testing.M) {
	switch {
	case filepath.Base(os.Args[0]) == stubPlugin:
		os.Exit(stubMain())
	case filepath.Base(os.Args[0]) == oldKernelProgram:
		oldKernelMain()
		return
	case filepath.Base(os.Args[0]) == noHybridProgram:
		noHybridMain()
		return
	case strings.HasSuffix(os.Args[0], nriProgram):
		os.Exit(nriMain())
	case isSandboxShim():
		sandboxShimMain()
		return
	}
	if signal.Ignored(syscall.SIGHUP) {
		// As under nohup. A program that starts with a signal ignored keeps it so,
		// and so would all containers; what is caught is none of theirs.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	daemon.Main(m, options(daemon.Edit(addSharedHandlers))...)
}

// options are those of every daemon in this package, the shared one included.
func options(more ...daemon.Option) []daemon.Option {
	opts := []daemon.Option{daemon.Edit(addStubHandler), daemon.Edit(addWrappedHandlers), daemon.Edit(addSandboxHandler), daemon.Edit(patientWithNRI)}
	if stock {
		opts = append(opts, daemon.Stock())
	}
	switch {
	case defaultHandler == crunHandler:
		opts = append(opts, daemon.Edit(addCrun))
	case defaultHandler == oldRuncHandler:
		opts = append(opts, daemon.Edit(addOldRunc))
	case stock && defaultHandler == "gantry":
		opts = append(opts, daemon.Edit(withGantry), daemon.Edit(withBare))
	case stock && defaultHandler == "pinned":
		opts = append(opts, daemon.Edit(withPinned), daemon.Edit(withBarePinned))
	}
	if os.Getenv("GANTRY_HANDLER") != "" {
		opts = append(opts, daemon.Set(defaultHandler, "plugins", daemon.RuntimePlugin, "containerd", "default_runtime_name"))
	}
	return append(opts, more...)
}
