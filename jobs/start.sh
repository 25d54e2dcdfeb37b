# On the cluster: `winnow` by the interpreter of the Ray that runs this job. It may be on no PATH, for `ray` can be
# started by its full name. $1 is the process of Ray's that started us, the rest are winnow's words. Where packages lie
# apart from their interpreter (~/.local, dist-packages), it is that of the PATH.
python=$(sed -n 's|.* \(/.*\)/lib[^/]*/python3[^/]*/[^/]*-packages/ray/_raylet\.so$|\1/bin/python3|p' "/proc/$1/maps" 2>/dev/null | head -n 1)
# Its cluster is that of the raylet above it. Ray itself tells a job the one that was started last on this machine.
raylet=$(sed -n 's|^PPid:[[:space:]]*||p' "/proc/$1/status" 2>/dev/null)
gcs=$(tr '\0' '\n' < "/proc/${raylet:-none}/cmdline" 2>/dev/null | sed -n 's|^--gcs-address=||p' | head -n 1)
[ -z "$gcs" ] || export RAY_ADDRESS="$gcs"
shift
[ -x "$python" ] || python=python3
exec "$python" -m jobs "$@"
