package cri

import (
	"math"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestStopSignal(t *testing.T) {
	for name, want := range map[string]cri.Signal{
		"SIGTERM": cri.Signal_SIGNAL_SIGTERM, "SIGRTMIN": cri.Signal_SIGNAL_SIGRTMIN,
		"SIGRTMIN+1": cri.Signal_SIGNAL_SIGRTMINPLUS1, "SIGRTMAX-1": cri.Signal_SIGNAL_SIGRTMAXMINUS1,
		"": cri.Signal_SIGNAL_RUNTIME_DEFAULT, "SIGBOGUS": cri.Signal_SIGNAL_RUNTIME_DEFAULT,
	} {
		if got := stopSignal(name); got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	}
}

func TestSeconds(t *testing.T) {
	for n, want := range map[int64]time.Duration{-1: 0, 0: 0, 30: 30 * time.Second, math.MaxInt64: 9223372036 * time.Second} {
		if got := seconds(n); got != want {
			t.Errorf("%d: %v, want %v", n, got, want)
		}
	}
}
