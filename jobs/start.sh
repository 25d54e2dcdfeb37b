# Start `winnow` on the cluster with the interpreter of the Ray that runs this job. It may not be on the PATH, because
# `ray` can be started by its full name. $1 is the process of Ray that started this script, the rest are the arguments
# of winnow. If packages are apart from their interpreter (~/.local, dist-packages), the python3 of the PATH is used.
python=$(sed -n 's|.* \(/.*\)/lib[^/]*/python3[^/]*/[^/]*-packages/ray/_raylet\.so$|\1/bin/python3|p' "/proc/$1/maps" 2>/dev/null | head -n 1)
# The job joins the cluster of the raylet above it: Ray itself names the cluster that was started last on this machine.
raylet=$(sed -n 's|^PPid:[[:space:]]*||p' "/proc/$1/status" 2>/dev/null)
gcs=$(tr '\0' '\n' < "/proc/${raylet:-none}/cmdline" 2>/dev/null | sed -n 's|^--gcs-address=||p' | head -n 1)
[ -z "$gcs" ] || export RAY_ADDRESS="$gcs"
shift
[ -x "$python" ] || python=python3
exec "$python" -m jobs "$@"
