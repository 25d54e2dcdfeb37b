# On the cluster: `winnow` by the interpreter of the Ray that runs this job. It may be on no PATH, for `ray` can be
# started by its full name. $1 is the process of Ray's that started us, the rest are winnow's words. Where packages lie
# apart from their interpreter (~/.local, dist-packages), it is that of the PATH.
python=$(sed -n 's|.* \(/.*\)/lib[^/]*/python3[^/]*/[^/]*-packages/ray/_raylet\.so$|\1/bin/python3|p' "/proc/$1/maps" 2>/dev/null | head -n 1)
shift
[ -x "$python" ] || python=python3
exec "$python" -m jobs "$@"
