package task

import (
	"context"
	"testing"
	"time"
)

// TestUncut: the end of a client is not the end of what it began; its deadline is.
func TestUncut(t *testing.T) {
	client, gone := context.WithCancel(t.Context())
	whole, cancel := uncut(client)
	defer cancel()
	gone()
	if err := whole.Err(); err != nil {
		t.Errorf("without its client: %v", err)
	}
	deadline := time.Now().Add(-time.Second)
	late, end := context.WithDeadline(t.Context(), deadline)
	defer end()
	whole, cancel = uncut(late)
	defer cancel()
	if got, ok := whole.Deadline(); !ok || !got.Equal(deadline) || whole.Err() == nil {
		t.Errorf("deadline %v, %v", got, whole.Err())
	}
}
