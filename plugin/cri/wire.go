package cri

import (
	"bytes"
	"slices"
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// wireItems keeps the items of a listing as they go over the wire. A kubelet
// lists every second what rarely changes: encoding two hundred pods takes half a
// millisecond and a quarter of a megabyte each time, and the garbage collections
// that this brings about are what the slowest listings wait for.
type wireItems[V comparable] struct {
	mu   sync.Mutex
	by   map[string]wireItem[V]
	last []byte // the latest listing; what was returned is not changed any more
}

// wireItem is the encoding of an item in one version.
type wireItem[V comparable] struct {
	version V
	wire    []byte
}

// spare is how many items that are gone may be kept.
const spare = 256

// of returns the encoding of the item with that ID in that version, which is
// made when it is not there.
func (w *wireItems[V]) of(id string, version V, item func() proto.Message) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if got, ok := w.by[id]; ok && got.version == version {
		return got.wire, nil
	}
	body, err := proto.Marshal(item())
	if err != nil {
		return nil, err
	}
	// Both listings have their items in field 1.
	wire := protowire.AppendTag(make([]byte, 0, len(body)+4), 1, protowire.BytesType)
	wire = protowire.AppendBytes(wire, body)
	if w.by == nil {
		w.by = map[string]wireItem[V]{}
	}
	w.by[id] = wireItem[V]{version, wire}
	return wire, nil
}

// join returns the items one after the other: the latest listing again, when it
// is just that.
func (w *wireItems[V]) join(items [][]byte) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !isJoined(w.last, items) {
		w.last = slices.Concat(items...)
	}
	return w.last
}

func isJoined(wire []byte, items [][]byte) bool {
	for _, item := range items {
		rest, ok := bytes.CutPrefix(wire, item)
		if !ok {
			return false
		}
		wire = rest
	}
	return len(wire) == 0
}

// trim forgets all when most of it belongs to items that are gone, there being
// so many.
func (w *wireItems[V]) trim(items int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.by) > 2*items+spare {
		clear(w.by)
	}
}

// setWire makes a message of its encoding. The message has it as fields that it
// does not know, which for whoever receives it are those that it is made of.
func setWire(m proto.Message, wire []byte) { m.ProtoReflect().SetUnknown(wire) }
