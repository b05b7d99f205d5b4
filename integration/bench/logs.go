package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// writer is how a container writes its output.
type writer struct {
	name    string
	command string  // with what is to be written in /lines
	rate    float64 // MiB/s that our own shim is to reach
}

// cpuPerGiB is the most that our own shim may take for a log, in seconds.
const cpuPerGiB = 5.0

var writers = []writer{
	{"one line of 100 bytes per write", "dd if=/lines bs=100", 150},
	{"640 lines per write", "dd if=/lines bs=64000", 500},
}

const (
	logBegins, logEnds = "the log begins", "the log ends"
	// logLimit is how long a log may take. Stock containerd writes a few MiB a second.
	logLimit = 10 * time.Minute
	logPoll  = 20 * time.Millisecond
	// logTail is more than its last lines take.
	logTail = 4096
)

// logs measures how fast a container can write to its log, and at what cost for
// whoever writes it down. How long it took is what the log itself says, by the times of
// its lines.
func logs(ctx context.Context, b *bench) (_ []table, err error) {
	nodes, err := b.launch(ctx, b.subjects)
	defer func() { err = errors.Join(err, retire(nodes)) }()
	if err != nil {
		return nil, err
	}
	t := table{title: fmt.Sprintf("Logs of %d MiB", b.logged)}
	for _, w := range writers {
		err := turns(b.rounds, nodes, func(round int, n *node) error { return b.logOf(ctx, w, &t.sheet, round, n) })
		if err != nil {
			return []table{t}, fmt.Errorf("%s: %w", w.name, err)
		}
	}
	t.remark = fmt.Sprintf("%d rounds. Lines have 100 bytes. CPU is that of the daemon and its shims, without the container's. Load average %s.", b.rounds, load())
	return []table{t}, nil
}

// logOf is one subject's part of a round.
func (b *bench) logOf(ctx context.Context, w writer, sh *sheet, round int, n *node) (err error) { //lint:house param-count: a closure's body
	p, err := n.up(ctx, cri.NamespaceMode_NODE, "writes", func(c *cri.ContainerConfig) {
		c.Command = []string{"sh", "-c", fmt.Sprintf(
			"yes %099d | head -n %d >/lines; echo %s; sleep 1; %s 2>/dev/null; echo %s; exec sleep 1000000", 7, b.logged<<20/100, logBegins, w.command, logEnds)}
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.down(context.WithoutCancel(ctx), p)) }()
	path := filepath.Join(p.config.LogDirectory, "main.log")
	if _, err := awaitLine(ctx, path, logBegins); err != nil {
		return err
	}
	before, err := cpuOf(n.books.daemon)
	if err != nil {
		return err
	}
	ended, err := awaitLine(ctx, path, logEnds)
	if err != nil {
		return err
	}
	after, err := cpuOf(n.books.daemon)
	if err != nil {
		return err
	}
	begun, err := firstLine(path)
	if err != nil {
		return err
	}
	mib := float64(b.logged)
	sh.note(quantity{name: w.name + ", time per MiB", unit: "ms", better: 1, own: goals{most: 1000 / w.rate}}, n.name, round, ended.Sub(begun).Seconds()*1000/mib)
	sh.note(quantity{name: w.name + ", CPU per MiB", unit: "ms", better: 1, own: goals{most: 1000 * cpuPerGiB / 1024}}, n.name, round, (after-before)/mib)
	return nil
}

// awaitLine waits until a line is in the log, near its end, and returns its time.
func awaitLine(ctx context.Context, path, line string) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, logLimit)
	defer cancel()
	tick := time.NewTicker(logPoll)
	defer tick.Stop()
	for {
		text, err := tailOf(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return time.Time{}, err
		}
		if at := bytes.Index(text, []byte(" stdout F "+line)); at >= 0 {
			return stampOf(text[bytes.LastIndexByte(text[:at], '\n')+1:])
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("wait for %q in the log: %w", line, ctx.Err())
		}
	}
}

// firstLine returns the time of the line after the one that says that the log begins.
func firstLine(path string) (time.Time, error) {
	f, err := os.Open(path)
	if err != nil {
		return time.Time{}, err
	}
	defer f.Close()
	text := make([]byte, logTail)
	n, err := f.Read(text)
	if err != nil {
		return time.Time{}, err
	}
	_, text, _ = bytes.Cut(text[:n], []byte("\n"))
	return stampOf(text)
}

// stampOf is the time at the beginning of a line.
func stampOf(line []byte) (time.Time, error) {
	stamp, _, _ := bytes.Cut(line, []byte(" "))
	return time.Parse(time.RFC3339Nano, string(stamp))
}

func tailOf(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	text := make([]byte, min(info.Size(), logTail))
	n, err := f.ReadAt(text, info.Size()-int64(len(text)))
	return text[:n], err
}
