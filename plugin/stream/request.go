package stream

import (
	"crypto/rand"
	"fmt"
	"slices"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd/errdefs"
)

// streams are what a client asked for.
type streams struct{ stdin, stdout, stderr, tty bool }

func (s streams) options() *remotecommand.Options {
	return &remotecommand.Options{Stdin: s.stdin, Stdout: s.stdout, Stderr: s.stderr, TTY: s.tty}
}

func (s streams) validate() error {
	switch {
	case s.tty && s.stderr:
		return fmt.Errorf("stderr: a tty has no stderr of its own: %w", errdefs.ErrInvalidArgument)
	case !s.stdin && !s.stdout && !s.stderr:
		return fmt.Errorf("stdin, stdout, stderr: one of them must be set: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

type execRequest struct {
	id      string
	cmd     []string
	streams streams
}

type attachRequest struct {
	id      string
	streams streams
}

type portForwardRequest struct {
	id    string
	ports []int32
}

// GetExec checks a request and returns the URL at which the session begins,
// once.
func (s *Server) GetExec(r *cri.ExecRequest) (*cri.ExecResponse, error) {
	req := &execRequest{id: r.GetContainerId(), cmd: slices.Clone(r.GetCmd()),
		streams: streams{r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty()}}
	err := req.streams.validate()
	switch {
	case req.id == "":
		err = missing("container_id")
	case len(req.cmd) == 0:
		err = missing("cmd")
	}
	if err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	u, err := s.hand("exec", req)
	if err != nil {
		return nil, err
	}
	return &cri.ExecResponse{Url: u}, nil
}

// GetAttach checks a request and returns the URL at which the session begins,
// once.
func (s *Server) GetAttach(r *cri.AttachRequest) (*cri.AttachResponse, error) {
	req := &attachRequest{id: r.GetContainerId(),
		streams: streams{r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty()}}
	err := req.streams.validate()
	if req.id == "" {
		err = missing("container_id")
	}
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	u, err := s.hand("attach", req)
	if err != nil {
		return nil, err
	}
	return &cri.AttachResponse{Url: u}, nil
}

// GetPortForward checks a request and returns the URL at which the session
// begins, once. SPDY clients name the ports later.
func (s *Server) GetPortForward(r *cri.PortForwardRequest) (*cri.PortForwardResponse, error) {
	req := &portForwardRequest{id: r.GetPodSandboxId(), ports: slices.Clone(r.GetPort())}
	if req.id == "" {
		return nil, fmt.Errorf("port-forward: %w", missing("pod_sandbox_id"))
	}
	for _, p := range req.ports {
		if p < 1 || p > 65535 {
			return nil, fmt.Errorf("port-forward: port: %d is not a port: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	u, err := s.hand("portforward", req)
	if err != nil {
		return nil, err
	}
	return &cri.PortForwardResponse{Url: u}, nil
}

func missing(field string) error {
	return fmt.Errorf("%s: must be set: %w", field, errdefs.ErrInvalidArgument)
}

func (s *Server) hand(kind string, req any) (string, error) {
	token, err := s.tokens.put(req)
	if err != nil {
		return "", fmt.Errorf("%s: %w", kind, err)
	}
	return s.base.JoinPath(kind, token).String(), nil
}

const (
	tokenLife = time.Minute
	maxTokens = 1000
)

// tokens are the requests whose client has not come yet.
type tokens struct {
	mu      sync.Mutex
	waiting map[string]waiting
}

type waiting struct {
	req   any
	until time.Time
}

func (t *tokens) put(req any) (string, error) {
	token := rand.Text()
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waiting == nil {
		t.waiting = map[string]waiting{}
	}
	if len(t.waiting) >= maxTokens {
		for k, w := range t.waiting {
			if now.After(w.until) {
				delete(t.waiting, k)
			}
		}
	}
	if len(t.waiting) >= maxTokens {
		return "", fmt.Errorf("%d sessions wait for their client: %w", maxTokens, errdefs.ErrResourceExhausted)
	}
	t.waiting[token] = waiting{req: req, until: now.Add(tokenLife)}
	return token, nil
}

// take gives out the request of a token, once. A token for another kind of
// session is used up by the attempt.
func take[R any](t *tokens, token string) (req R, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w, ok := t.waiting[token]
	delete(t.waiting, token)
	if !ok || time.Now().After(w.until) {
		return req, false
	}
	req, ok = w.req.(R)
	return req, ok
}
