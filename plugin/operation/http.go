package operation

import (
	"encoding/json"
	"net/http"
	"runtime/pprof"
)

// Socket is the name of the socket in the plugin's state directory that Handler
// is served on.
const Socket = "gantry.sock"

// Handler serves the table for people and tools: "GET /operations" is the list
// as JSON, "GET /stacks" every goroutine with its stack as text. Neither waits
// for anything but the table's own short lock.
func (t *Table) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /operations", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(t.List()) // an error is the reader's leaving
	})
	mux.HandleFunc("GET /stacks", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		pprof.Lookup("goroutine").WriteTo(w, 2)
	})
	return mux
}
