package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"unicode"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// maxWords bounds what a registry's own words add to an error.
const maxWords = 512

// stageError says in which stage of a pull an error was born.
type stageError struct {
	stage string
	err   error
}

// Error implements error.
func (e *stageError) Error() string { return e.stage + ": " + e.err.Error() }

// Unwrap implements the errors package's protocol.
func (e *stageError) Unwrap() error { return e.err }

func atStage(stage string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*stageError](err); ok {
		return err
	}
	return &stageError{stage: stage, err: err}
}

// statusError is a registry's refusal that the registry client does not turn
// into an error with host and status itself.
type statusError struct {
	host, status string
	code         int
	err          error
}

// Error implements error.
func (e *statusError) Error() string {
	return fmt.Sprintf("registry %s: %s: %s", e.host, e.status, plain(words(e.err)))
}

// Unwrap implements the errors package's protocol.
func (e *statusError) Unwrap() error { return e.err }

// pullError is what a caller of Pull gets: words for people and a class for
// programs. The words never hold a query string, where signed URLs carry
// their signature.
type pullError struct {
	text  string
	class error
	err   error
}

// Error implements error.
func (e *pullError) Error() string { return e.text }

// Unwrap gives the class first, which decides about the gRPC code.
func (e *pullError) Unwrap() []error { return []error{e.class, e.err} }

// pullFailed describes why ref could not be pulled. cause is why the pull's
// context ended, nil while it has not.
func pullFailed(ref string, err, cause error) error {
	stage := stageFetch
	if s, ok := errors.AsType[*stageError](err); ok {
		stage = s.stage
		err = s.err
	}
	if cause != nil {
		err = cause
		if s, ok := errors.AsType[*stallError](cause); ok {
			stage = s.stage
		}
	}
	return &pullError{
		text:  fmt.Sprintf("pull image %q: %s: %s", ref, stage, words(err)),
		class: classOf(err),
		err:   err,
	}
}

// words puts an error into words: for a registry's refusal the host, the
// status and the registry's own message.
func words(err error) string {
	if s, ok := errors.AsType[*statusError](err); ok {
		return s.Error()
	}
	if u, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		text := fmt.Sprintf("registry %s: %s", hostOf(u.RequestURL), u.Status)
		if said, ok := errors.AsType[docker.Errors](err); ok {
			text += ": " + plain(said.Error())
		}
		return text
	}
	if u, ok := errors.AsType[*url.Error](err); ok {
		return fmt.Sprintf("registry %s: %s", hostOf(u.URL), plain(u.Err.Error()))
	}
	return plain(err.Error())
}

func hostOf(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "(unreadable address)"
	}
	return u.Host
}

// plain makes foreign text fit for a log line: one line, printable, bounded.
func plain(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
	if len(s) > maxWords {
		s = strings.ToValidUTF8(s[:maxWords], "") + "…"
	}
	return strings.TrimSpace(s)
}

// classOf returns the errdefs class of a failed pull.
func classOf(err error) error {
	if s, ok := errors.AsType[*statusError](err); ok {
		return classOfStatus(s.code)
	}
	if u, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		return classOfStatus(u.StatusCode)
	}
	if errors.Is(err, docker.ErrInvalidAuthorization) {
		return errdefs.ErrUnauthenticated
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return errdefs.ErrResourceExhausted
	}
	if class := errdefs.Resolve(err); !errors.Is(class, errdefs.ErrUnknown) {
		return class
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return errdefs.ErrUnavailable
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrInternal
}

func classOfStatus(code int) error {
	switch {
	case code == http.StatusUnauthorized:
		return errdefs.ErrUnauthenticated
	case code == http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case code == http.StatusNotFound:
		return errdefs.ErrNotFound
	case code == http.StatusTooManyRequests:
		return errdefs.ErrResourceExhausted
	case code == http.StatusRequestTimeout || code >= 500:
		return errdefs.ErrUnavailable
	default:
		return errdefs.ErrFailedPrecondition
	}
}

// logFailure records an error nobody is waiting for.
func logFailure(ctx context.Context, what string, err error) {
	log.G(ctx).WithError(err).Warn(what)
}
