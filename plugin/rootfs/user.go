package rootfs

import (
	"fmt"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// UserRequest is what the CRI and the image say about a container's identity.
type UserRequest struct {
	// RunAsUser and RunAsGroup are nil when not given.
	RunAsUser, RunAsGroup *int64
	RunAsUsername         string
	SupplementalGroups    []int64
	Policy                cri.SupplementalGroupsPolicy
	// ImageUser is the USER of the image, used when the CRI names no user.
	ImageUser string
}

// RequestOf takes the request out of a container's security context, which may
// be nil.
func RequestOf(sc *cri.LinuxContainerSecurityContext, imageUser string) UserRequest {
	r := UserRequest{
		RunAsUsername:      sc.GetRunAsUsername(),
		SupplementalGroups: sc.GetSupplementalGroups(),
		Policy:             sc.GetSupplementalGroupsPolicy(),
		ImageUser:          imageUser,
	}
	if v := sc.GetRunAsUser(); v != nil {
		r.RunAsUser = &v.Value
	}
	if v := sc.GetRunAsGroup(); v != nil {
		r.RunAsGroup = &v.Value
	}
	return r
}

// LookupUser resolves a request inside a root filesystem.
//
// The user is run_as_username or run_as_user, else the image's USER, else 0.
// The group is run_as_group, else the group in the USER that was used, else the
// user's in passwd, else 0. A name must exist, a number need not. The group
// set holds the primary group, the supplemental groups and, under Merge, the
// groups that name the user in the image.
func LookupUser(root *os.File, req UserRequest) (facts.User, error) {
	u, err := lookup(root, req)
	if err != nil {
		return facts.User{}, fmt.Errorf("resolve user: %w", err)
	}
	return u, nil
}

func lookup(root *os.File, req UserRequest) (facts.User, error) {
	user, grp, err := req.identity()
	if err != nil {
		return facts.User{}, err
	}
	supplemental, err := requestedGroups(req)
	if err != nil {
		return facts.User{}, err
	}
	acc, found, err := passwdEntry(root, user)
	if err != nil {
		return facts.User{}, err
	}
	u := facts.User{Home: "/"}
	switch {
	case found:
		u.UID, u.GID, u.Name = acc.uid, acc.gid, acc.name
		if acc.home != "" {
			u.Home = acc.home
		}
		if err := checkHome(u.Home); err != nil {
			return facts.User{}, err
		}
	case user.ID == nil:
		return facts.User{}, fmt.Errorf("no user %q in the image's %s: %w", user.Name, passwdFile, errdefs.ErrNotFound)
	default:
		u.UID = *user.ID
	}
	switch {
	case grp.ID != nil:
		u.GID = *grp.ID
	case grp.Name != "":
		if u.GID, err = groupID(root, grp.Name); err != nil {
			return facts.User{}, err
		}
	}
	if req.Policy == cri.SupplementalGroupsPolicy_Merge && u.Name != "" {
		ids, err := memberships(root, u.Name)
		if err != nil {
			return facts.User{}, err
		}
		supplemental = append(supplemental, ids...)
	}
	u.AdditionalGIDs = groupSet(u.GID, supplemental)
	return u, nil
}

// identity decides which user and group are meant, before any file is read.
func (r UserRequest) identity() (user, grp Identity, err error) {
	switch {
	case r.RunAsUsername != "" && r.RunAsUser != nil:
		return user, grp, fmt.Errorf("run_as_user and run_as_username are both set: %w", errdefs.ErrInvalidArgument)
	case r.RunAsUsername != "":
		// A number in the place of a name is that number; it must not be
		// looked up as a name.
		if user, err = ParseIdentity(r.RunAsUsername); err != nil {
			return user, grp, fmt.Errorf("run_as_username: %w", err)
		}
	case r.RunAsUser != nil:
		id, err := checkID("run_as_user", *r.RunAsUser)
		if err != nil {
			return user, grp, err
		}
		user = Identity{ID: &id}
	case r.RunAsGroup != nil:
		return user, grp, fmt.Errorf("run_as_group is set without run_as_user or run_as_username: %w", errdefs.ErrInvalidArgument)
	default:
		if user, grp, err = ParseUser(r.ImageUser); err != nil {
			return user, grp, fmt.Errorf("USER of the image: %w", err)
		}
		if user.Zero() {
			user.ID = new(uint32)
		}
	}
	if r.RunAsGroup != nil {
		id, err := checkID("run_as_group", *r.RunAsGroup)
		if err != nil {
			return user, grp, err
		}
		grp = Identity{ID: &id}
	}
	return user, grp, nil
}

func requestedGroups(req UserRequest) ([]uint32, error) {
	switch req.Policy {
	case cri.SupplementalGroupsPolicy_Merge, cri.SupplementalGroupsPolicy_Strict:
	default:
		return nil, fmt.Errorf("supplemental_groups_policy %d is unknown: %w", req.Policy, errdefs.ErrInvalidArgument)
	}
	ids := make([]uint32, 0, len(req.SupplementalGroups))
	for i, g := range req.SupplementalGroups {
		id, err := checkID(fmt.Sprintf("supplemental_groups[%d]", i), g)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

func checkID(field string, v int64) (uint32, error) {
	if v < 0 || v > MaxID {
		return 0, fmt.Errorf("%s: %d is not a number from 0 to %d: %w", field, v, MaxID, errdefs.ErrInvalidArgument)
	}
	return uint32(v), nil
}

// groupSet puts the primary group first: a process that lacks it in its set
// passes group checks that should deny it.
func groupSet(primary uint32, rest []uint32) []uint32 {
	slices.Sort(rest)
	set := []uint32{primary}
	for _, g := range slices.Compact(rest) {
		if g != primary {
			set = append(set, g)
		}
	}
	return set
}
