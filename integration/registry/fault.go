package registry

import (
	"bytes"
	"net/http"
	"strings"
	"time"
)

// Fault is one way of misbehaving, for the requests it matches. The first
// fault that matches is used.
type Fault struct {
	// Match chooses requests; nil for all.
	Match func(*http.Request) bool
	// Times is how many requests are hit; 0 for all.
	Times int
	// BeforeAuth hits requests whether they are authorised or not.
	BeforeAuth bool

	// Delay before the answer. It ends early when the client goes away.
	Delay time.Duration
	// Hold keeps the answer back until it is closed.
	Hold <-chan struct{}
	// Status answers with an error and nothing else.
	Status int
	// Header is added to the answer.
	Header http.Header
	// Redirect answers with a redirect there.
	Redirect string
	// Body replaces the answer's body, with status 200.
	Body []byte
	// Endless sends zero bytes without end and without a length, or Body, its last
	// byte again and again.
	Endless bool

	// CutAfter breaks the connection after so many bytes of the body.
	CutAfter int64
	// StallAfter sends nothing more after so many bytes of the body, until
	// the client goes away.
	StallAfter int64
	// Trickle sends the body one byte at a time with this pause.
	Trickle time.Duration
	// Corrupt changes the first byte of the body.
	Corrupt bool
}

// Inject adds a fault.
func (r *Registry) Inject(f Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f.Times == 0 {
		f.Times = -1
	}
	r.faults = append(r.faults, &f)
}

// Heal removes all faults.
func (r *Registry) Heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = nil
}

// Blobs matches requests for the content of any of the blobs; of every blob
// when none is named.
func Blobs(digests ...string) func(*http.Request) bool {
	return func(req *http.Request) bool {
		return req.Method == http.MethodGet && under(req, "/blobs/", digests)
	}
}

// Manifests matches requests for manifests by any of these tags or digests; by
// all when none is named.
func Manifests(refs ...string) func(*http.Request) bool {
	return func(req *http.Request) bool {
		return (req.Method == http.MethodGet || req.Method == http.MethodHead) && under(req, "/manifests/", refs)
	}
}

func under(req *http.Request, mark string, names []string) bool {
	_, name, ok := strings.Cut(req.URL.Path, mark)
	if !ok || len(names) == 0 {
		return ok
	}
	for _, n := range names {
		if n == name {
			return true
		}
	}
	return false
}

// fault returns the fault for a request. The caller holds r.mu.
func (r *Registry) fault(req *http.Request) *Fault {
	for _, f := range r.faults {
		if f.Times == 0 || (f.Match != nil && !f.Match(req)) {
			continue
		}
		if f.Times > 0 {
			f.Times--
		}
		return f
	}
	return nil
}

// misbehave answers a request the way the fault wants it.
func (r *Registry) misbehave(f *Fault, w http.ResponseWriter, req *http.Request) {
	if f.Delay > 0 && !pause(req, f.Delay) {
		return
	}
	if f.Hold != nil {
		select {
		case <-f.Hold:
		case <-req.Context().Done():
			return
		}
	}
	for k, v := range f.Header {
		w.Header()[k] = v
	}
	switch {
	case f.Status != 0:
		refuse(w, f.Status, "FAULT", http.StatusText(f.Status))
	case f.Redirect != "":
		http.Redirect(w, req, f.Redirect, http.StatusTemporaryRedirect)
	case f.Endless:
		if req.Method != http.MethodHead {
			endless(w, f.Body)
		}
	case f.Body != nil:
		_, _ = w.Write(f.Body)
	default:
		r.serve(&shaped{ResponseWriter: w, f: f, req: req}, req)
	}
}

// endless writes until the client goes away.
func endless(w http.ResponseWriter, begin []byte) {
	last := []byte{0}
	if n := len(begin); n > 0 {
		last = begin[n-1:]
	}
	_, err := w.Write(begin)
	for more := bytes.Repeat(last, 64<<10); err == nil; {
		_, err = w.Write(more)
	}
}

// pause reports whether the client is still there afterwards.
func pause(req *http.Request, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-req.Context().Done():
		return false
	}
}

// shaped sends a body with a fault in it.
type shaped struct {
	http.ResponseWriter
	f    *Fault
	req  *http.Request
	sent int64
}

// Write implements io.Writer.
func (s *shaped) Write(p []byte) (int, error) {
	for i := range p {
		b := p[i : i+1]
		if s.f.Corrupt && s.sent == 0 {
			b = []byte{p[i] ^ 0xff}
		}
		if s.f.Trickle == 0 && s.f.CutAfter == 0 && s.f.StallAfter == 0 {
			if _, err := s.ResponseWriter.Write(b); err != nil {
				return i, err
			}
			s.sent++
			n, err := s.ResponseWriter.Write(p[i+1:])
			s.sent += int64(n)
			return i + 1 + n, err
		}
		if err := s.one(b); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

// one sends one byte, or ends the connection.
func (s *shaped) one(b []byte) error {
	switch {
	case s.f.CutAfter > 0 && s.sent >= s.f.CutAfter:
		s.flush()
		panic(http.ErrAbortHandler)
	case s.f.StallAfter > 0 && s.sent >= s.f.StallAfter:
		s.flush()
		<-s.req.Context().Done()
		panic(http.ErrAbortHandler)
	}
	if s.f.Trickle > 0 && !pause(s.req, s.f.Trickle) {
		panic(http.ErrAbortHandler)
	}
	_, err := s.ResponseWriter.Write(b)
	s.sent++
	if s.f.Trickle > 0 {
		s.flush()
	}
	return err
}

func (s *shaped) flush() {
	if f, ok := s.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}
