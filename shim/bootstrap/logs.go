package bootstrap

import (
	"bytes"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// logs writes into the pipe of any bundle: containerd reads those of the tasks it
// knows, and a supervisor has none of its own.
type logs struct {
	mu      sync.Mutex
	bundles []string
	// early is what was said before the first bundle, as far as it is kept.
	early [][]byte
	begun bool // there has been a bundle
}

// maxEarly bounds the lines that wait for the first bundle.
const maxEarly = 16

func newLogs(debug bool) *logs {
	l := &logs{}
	logrus.SetOutput(l)
	_ = log.SetFormat(log.TextFormat) // it knows that
	if debug {
		_ = log.SetLevel(log.DebugLevel.String())
	}
	return l
}

// Add offers the pipe of a bundle.
func (l *logs) Add(bundle string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Contains(l.bundles, bundle) {
		l.bundles = append(l.bundles, bundle)
	}
	early := l.early
	l.early, l.begun = nil, true
	for _, line := range early {
		l.write(line)
	}
}

// Write implements io.Writer. A line that nobody reads is lost, and a bundle that
// nobody reads is forgotten.
func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.begun {
		if len(l.early) < maxEarly {
			l.early = append(l.early, bytes.Clone(b))
		}
		return len(b), nil
	}
	l.write(b)
	return len(b), nil
}

func (l *logs) write(line []byte) {
	for len(l.bundles) > 0 {
		last := len(l.bundles) - 1
		if writePipe(filepath.Join(l.bundles[last], "log"), line) {
			break
		}
		l.bundles = l.bundles[:last]
	}
}

func writePipe(path string, b []byte) bool {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, b)
	return err == nil || err == unix.EAGAIN
}
