"""A compact PyBullet simulator of the one-shot pushing benchmark.

A 7-DoF torque-controlled arm pushes the *target* object onto a red disc and leaves the
*distractor* alone; which of the two is the target is told by a demonstration only. The start
ranges, the camera, the control rate and the success rule are those of MIL's simulated pushing
(Finn et al., CoRL 2017), the benchmark of the TecNets paper. Lengths are metres, angles radians,
torques newton metres; the goal is the origin, +x points from the robot to the camera.
"""
import collections
import colorsys
import contextlib
import ctypes
import functools
import io
import itertools
import locale
import math
import operator
import os
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

_libc = ctypes.CDLL(None)
_libc.fopen.restype = _libc.newlocale.restype = _libc.uselocale.restype = ctypes.c_void_p
# PyBullet prints when it is imported, to C's stderr: that leads nowhere meanwhile. Python's, and the descriptor, stay.
_stderr = ctypes.c_void_p.in_dll(_libc, "stderr" if sys.platform == "linux" else "__stderrp")
_before, _stderr.value = _stderr.value, _libc.fopen(os.devnull.encode(), b"w")
try:
    import pybullet
    import pybullet_data
    from pybullet_utils.bullet_client import BulletClient
finally:
    _stderr.value = _before


@contextlib.contextmanager
def _decimal_points():
    """PyBullet reads and writes numbers as the locale does, some with commas: within, this thread uses points."""
    before = _libc.uselocale(ctypes.c_void_p(_libc.newlocale(1 << locale.LC_NUMERIC, b"C", None)))
    try:
        yield
    finally:
        _libc.freelocale(ctypes.c_void_p(_libc.uselocale(ctypes.c_void_p(before))))


class _Client(BulletClient):
    """A physics client; BulletClient itself makes PyBullet print."""

    def __init__(self):
        self._shapes, self._pid, self._client = {}, os.getpid(), pybullet.connect(pybullet.DIRECT)


def _for_pybullet(path):
    """A path as PyBullet takes it, which encodes names in UTF-8 whatever the locale. Raises OSError if it cannot."""
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise OSError(f"PyBullet cannot open {path!r}, whose name is not UTF-8: move it, or set TMPDIR if it is temporary")


@contextlib.contextmanager
def _temporary_folder(files):
    """The path of a folder of files (bytes by name), since PyBullet reads files only; it is deleted in the end. Raises OSError."""
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(tempfile.TemporaryDirectory())
            for name, content in files.items():
                with open(os.path.join(path, name), "wb") as file:
                    file.write(content)
        except OSError as error:
            raise OSError(f"no temporary file can be written in {tempfile.tempdir or 'TMPDIR'} ({error.strerror}): "
                          "make room there, or set TMPDIR to another folder")
        yield _for_pybullet(path)


VERSION = 3  # of all below: results of one version say nothing of another
# The benchmark's rules (MIL's simulated pushing).
CONTROL_HZ = 20
HORIZON = 100  # control steps, 5 s
IMAGE_SIZE = 125  # pixels
STATE_DIM = 20  # 7 joint angles, 7 joint velocities, end effector (3), goal (3)
ACTION_DIM = 7
# A scene mirrored in the x-z plane, y for -y, is again a valid scene. The signs that mirror action and state:
MIRRORED_ACTION = np.array([-1, 1, -1, 1, -1, 1, -1], np.float32)
MIRRORED_STATE = np.concatenate([MIRRORED_ACTION, MIRRORED_ACTION, np.float32([1, -1, 1, 1, -1, 1])])
MIRROR = {"states": MIRRORED_STATE.tolist(), "actions": MIRRORED_ACTION.tolist()}  # as a data set's manifest has it
GOAL_RADIUS = 0.08  # of the drawn disc
SUCCESS_DISTANCE = 0.017 ** 0.5  # 0.13 m: the rule is a squared distance below 0.017; more than the disc's radius
SUCCESS_STEPS = 10  # control steps within SUCCESS_DISTANCE
STRICT_DISTANCE = 0.05  # final distance of the stricter rule reported beside it
MOVED_DISTANCE = 0.03  # a distractor moved further than this counts as moved
START_X, START_Y = (-0.3, 0.0), (0.0, 0.2)  # of an object; -y for the other side
GOAL_CLEARANCE, OBJECT_CLEARANCE = 0.17, 0.10  # objects start at least the sum of their radii apart as well
MAX_CLEARANCE = 0.45  # the start area has places that far apart
START_SPEED = 0.005  # joint velocities at the start, U(-0.005, 0.005) rad/s

# The objects. 999 usable meshes of pybullet_data/random_urdfs (168 holds NaNs), split for good.
SPLITS = ("train", "val", "test")
_MESHES = np.random.default_rng(0).permutation([i for i in range(1000) if i != 168]).tolist()
MESHES = dict(train=_MESHES[:699], val=_MESHES[699:850], test=_MESHES[850:])
SIZE = (0.055, 0.27)  # largest horizontal extent, the range of the benchmark
HEIGHT = (0.03, 0.08)  # a mesh is stretched or flattened into this range, the fork travels above
MASS = (0.1, 2.0)  # kg, log-uniform
FRICTION = (0.15, 0.5)  # sliding, against the table; with the mass 0.15-10 N of resistance
SIMILAR = 0.3  # share of pairs whose objects look nearly the same
PATTERNS = ("flat", "stripes", "checks", "patches")

# The arm: KUKA iiwa on a bracket that the camera does not see, flange down, a fork as the tool.
BASE = (-0.61, 0.0, 0.36)
FORK_LINK = 7  # its frame is the end effector: centre of the bar, prongs along -x, z down
FORK_WIDTH, PRONG, STEM = 0.15, 0.06, 0.12
FLANGE = STEM + 0.045  # from the last link's frame to the fork's
START_JOINTS = (0.0, 1.562, 0.0, -2.045, 0.0, -0.465, 0.0)  # fork at (-0.37, 0, 0.12), pointing at the goal
DAMPING = np.array([15, 15, 10, 8, 1.5, 1.5, 0.6])  # N m s/rad: torque acts like a velocity command
TORQUE = np.array([20, 20, 10, 10, 2, 2, 1.0])  # N m, of action 1
MAX_SPEED = math.pi  # rad/s, of the iiwa 7's fastest joints; a blow against the fork cannot spin one faster
SUBSTEPS = 12  # of 1/240 s
# PyBullet's explicit damping D diverges where (time step) x (largest eigenvalue of M^-1 D), M the arm's mass matrix, is
# above 2. Demonstrations stay below this limit; where a pose exceeds it, the time step is divided.
MAX_DAMPING_STEP = 1.9

# The camera, opposite the robot: 0.73 m from the goal, 50 degrees down, 45 degrees field of view.
CAMERA_TARGET, CAMERA_DISTANCE, CAMERA_ELEVATION, CAMERA_FOV = (-0.12, 0, 0), 0.8, -50, 45
NEAR, FAR = 0.1, 3.0
LIGHT = (1.0, 0.0, 2.0)  # its direction, in the mirror plane
SUPERSAMPLE = 2  # rendered at twice the size and averaged
TABLE_EDGE = 2.0  # from the goal, along x and y
# All but the objects is as green as it is blue: exchange the two in a picture, and it shows a valid scene again.
TABLE_RGB, GOAL_RGB = (0.68, 0.70, 0.70), (0.85, 0.05, 0.05)
ARM_RGB = {5: (0.55, 0.62, 0.62), 6: (0.92, 0.92, 0.92)}  # the camera never sees other links, but their flange
LINK_CELL = 0.03  # vertices of these links that fall into one cell of this size become one


@dataclass(frozen=True)
class Appearance:
    """A two-colour procedural texture; `colours` are two RGB triples in [0, 1]."""
    pattern: str
    colours: tuple
    seed: int

    def __post_init__(self):
        colours = np.array(self.colours, float)
        if self.pattern not in PATTERNS or colours.shape != (2, 3) or not (0 <= colours.min() and colours.max() <= 1):
            raise ValueError(f"an appearance has a pattern of {', '.join(PATTERNS)} and two colours in [0, 1], not {self}")


@dataclass(frozen=True)
class Body:
    """One object: `size` is its largest horizontal extent (m), `mass` in kg.

    `mesh_id` is the number of a mesh of pybullet_data/random_urdfs, or the path of an OBJ file of triangles.
    """
    mesh_id: int | str
    size: float
    mass: float
    friction: float
    appearance: Appearance

    def __post_init__(self):
        if not (0 < self.size < math.inf and 0 < self.mass < math.inf and 0 <= self.friction < math.inf):
            raise ValueError(f"a body has a size and a mass above 0 and a friction of 0 or more, not {self}")


@dataclass(frozen=True)
class Task:
    """Push `target` to the goal, leave `distractor`. Tasks 2k and 2k + 1 of a split swap the two.

    make_task gives those of the benchmark's splits; a task of your own bears another name for its split.
    """
    split: str
    index: int
    target: Body
    distractor: Body


def make_task(split, index):
    """The task of a split ("train", "val", "test") with an index >= 0, always the same one.

    Raises ValueError for an unknown split or a negative index, TypeError for one that is no whole number.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if operator.index(index) < 0:
        raise ValueError(f"a task's index is 0 or more, not {index}")
    pair, swapped = divmod(index, 2)
    rng = np.random.default_rng([SPLITS.index(split), pair])
    meshes = MESHES[split]
    looks = [_random_appearance(rng) for _ in range(2)]
    if rng.random() < SIMILAR:
        colours = np.clip(np.array(looks[0].colours) + rng.normal(0, 0.06, (2, 3)), 0, 1)
        looks[1] = Appearance(looks[0].pattern, tuple(map(tuple, colours.tolist())), looks[1].seed)
    bodies = [Body(mesh_id=meshes[(2 * pair + i) % len(meshes)],
                   size=float(np.exp(rng.uniform(*np.log(SIZE)))),
                   mass=float(np.exp(rng.uniform(*np.log(MASS)))),
                   friction=float(rng.uniform(*FRICTION)),
                   appearance=looks[i]) for i in range(2)]
    return Task(split, index, bodies[swapped], bodies[1 - swapped])


def split_key(split):
    """The number that stands for a split in the seeds of its scenes; a name of your own is hashed."""
    return SPLITS.index(split) if split in SPLITS else len(SPLITS) + zlib.crc32(split.encode())


def _random_appearance(rng):
    colours = tuple(colorsys.hsv_to_rgb(*rng.uniform((0, 0.1, 0.25), (1, 1, 1))) for _ in range(2))
    return Appearance(PATTERNS[rng.integers(len(PATTERNS))], colours, int(rng.integers(2 ** 31)))


def _texture(look, cells=8):
    """The 64 x 64 pixel picture of an appearance."""
    row, column = np.indices((cells, cells))
    mix = {"flat": np.zeros((cells, cells)), "stripes": column // 2 % 2,
           "checks": (row // 2 + column // 2) % 2,
           "patches": np.random.default_rng(look.seed).random((cells, cells))}[look.pattern]
    a, b = np.array(look.colours) * 255
    pixels = (a + mix[..., None] * (b - a)).astype(np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)


@functools.lru_cache(maxsize=64)
def _mesh(mesh_id):
    """Path, vertices (V, 3) and triangles (T, 3) of a Body's mesh."""
    path = mesh_id
    if isinstance(mesh_id, int):
        path = os.path.join(pybullet_data.getDataPath(), "random_urdfs", f"{mesh_id:03d}", f"{mesh_id:03d}.obj")
    vertices, faces = [], []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            kind, *values = line.split() or [""]
            if kind == "v":
                vertices.append([float(v) for v in values[:3]])
            elif kind == "f":
                faces.append([int(v.split("/")[0]) - 1 for v in values])
    if {len(face) for face in faces} != {3} or np.min(faces) < 0:
        raise ValueError(f"{path} must have triangles, with vertices counted from its beginning")
    return _for_pybullet(path), np.array(vertices), np.array(faces)


def body_shape(body):
    """Scale (3,), centre (3,) in mesh units and horizontal radius (m) that give a body its size."""
    return _shape(body.mesh_id, body.size)[:3]


@functools.lru_cache(maxsize=64)
def _shape(mesh_id, size):
    """What body_shape says, and the vertices (V, 3) of a Body about its centre, in metres."""
    _, vertices, _ = _mesh(mesh_id)
    low, high = vertices.min(0), vertices.max(0)
    scale = size / (high - low)[:2].max()
    height = np.clip((high - low)[2] * scale, *HEIGHT)
    scale = np.array([scale, scale, height / (high - low)[2]])
    centre = (low + high) / 2
    vertices = (vertices - centre) * scale
    return scale, centre, float(np.linalg.norm(vertices[:, :2], axis=1).max()), vertices


def _obj(faces, **rows):
    """An OBJ, as bytes: its rows of numbers by kind (v, vt, vn), and its faces, a text for every corner."""
    lines = [" ".join([kind, *map(repr, row)]) for kind in rows for row in rows[kind].tolist()]
    return "\n".join(lines + [" ".join(("f", *corners)) for corners in faces]).encode()


@functools.lru_cache(maxsize=4)
def _textured(mesh_id, size):
    """An OBJ of a Body's mesh, all triangles flat, the texture projected along the axis that a triangle faces most."""
    triangles = _shape(mesh_id, size)[3][_mesh(mesh_id)[2]]
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    facing = np.abs(normals).argmax(1)
    uvs = np.take_along_axis(triangles, np.array([[1, 2], [0, 2], [0, 1]])[facing][:, None], 2) / 0.08
    return _obj([[f"{j}/{j}/{i + 1}" for j in (3 * i + 1, 3 * i + 2, 3 * i + 3)] for i in range(len(triangles))],
                v=triangles.reshape(-1, 3), vt=uvs.reshape(-1, 2), vn=normals)


def _simplified(path):
    """An OBJ of a mesh with a fifth of its triangles: vertices in one LINK_CELL become one. Its shading is smooth."""
    _, vertices, faces = _mesh(path)
    _, cell = np.unique(np.round(vertices / LINK_CELL), axis=0, return_inverse=True)
    cell = cell.ravel()
    vertices = np.stack([np.bincount(cell, column) for column in vertices.T], 1) / np.bincount(cell)[:, None]
    faces = cell[faces]
    faces = faces[(faces != np.roll(faces, 1, 1)).all(1)]
    a, b, c = vertices[faces].swapaxes(0, 1)
    normals = np.zeros_like(vertices)
    np.add.at(normals, faces, np.cross(b - a, c - a)[:, None])
    return _obj([[f"{i}//{i}" for i in face] for face in (faces + 1).tolist()], v=vertices,
                vn=normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12))


@functools.lru_cache(maxsize=1)
def _arm():
    """The files (bytes by name) of pybullet_data's iiwa with the fork, and the corners (8, 3) of its drawn links by number.

    It has no collision shapes but the fork's, and no visuals that the camera never sees.
    """
    folder = os.path.join(pybullet_data.getDataPath(), "kuka_iiwa")
    root, files = ElementTree.parse(os.path.join(folder, "model.urdf")).getroot(), {}
    corners = {FORK_LINK: _corners((-PRONG, -FORK_WIDTH / 2, -FLANGE - 0.02), (0.006, FORK_WIDTH / 2, 0.02))}
    for number, link in enumerate(root.findall("link")):
        link.remove(link.find("collision"))
        centre = link.find("inertial/origin")
        x, y, z = centre.get("xyz").split()  # put on the mirror plane, which is y = 0 or z = 0 of a link's frame
        centre.set("xyz", f"{x} 0 {z}" if number % 2 else f"{x} {y} 0")
        if number in ARM_RGB:
            mesh, name = link.find("visual/geometry/mesh"), f"link_{number}.obj"
            path = os.path.join(folder, mesh.get("filename"))
            files[name], vertices = _simplified(path), _mesh(path)[1]
            mesh.set("filename", name)
            corners[number - 1] = _corners(vertices.min(0), vertices.max(0))  # PyBullet counts from after the base
            paint = root.find(f"material[@name='{link.find('visual/material').get('name')}']/color")
            paint.set("rgba", " ".join(map(str, (*ARM_RGB[number], 1))))
        else:
            link.remove(link.find("visual"))
    boxes = [((0.012, FORK_WIDTH, 0.04), (0, 0, 0)), ((0.02, 0.02, STEM), (0, 0, -STEM / 2))]
    boxes += [((PRONG, 0.0075, 0.04), (-PRONG / 2, side * (FORK_WIDTH - 0.0075) / 2, 0)) for side in (-1, 1)]
    shapes = "".join(
        f'<{kind}><origin xyz="{x} {y} {z}"/><geometry><box size="{a} {b} {c}"/></geometry>{paint}</{kind}>'
        for (a, b, c), (x, y, z) in boxes for kind, paint in
        (("visual", '<material name="Black"><color rgba="0.08 0.08 0.08 1"/></material>'), ("collision", "")))
    root.extend(ElementTree.fromstring(f"""<fork>
        <link name="fork"><inertial><mass value="0.5"/>
          <inertia ixx="0.003" iyy="0.003" izz="0.003" ixy="0" ixz="0" iyz="0"/></inertial>{shapes}
          <visual><origin xyz="0 0 {-FLANGE}"/><geometry><cylinder radius="0.045" length="0.04"/></geometry>
            <material name="Grey"/></visual></link>
        <joint name="fork_joint" type="fixed"><parent link="lbr_iiwa_link_7"/><child link="fork"/>
          <origin xyz="0 0 {FLANGE}"/></joint></fork>"""))
    return {**files, "arm.urdf": ElementTree.tostring(root, encoding="utf-8")}, corners


def _corners(low, high):
    """The corners (8, 3) of a box."""
    return np.array(list(itertools.product(*zip(low, high))))


@functools.lru_cache(maxsize=4)
def _background(size):
    """The empty scene, which stands behind the moving bodies: RGBA (size, size) as uint32, and averaged as a picture is."""
    client = _Client()
    table = client.createVisualShape(client.GEOM_BOX, halfExtents=(TABLE_EDGE, TABLE_EDGE, 0.01), rgbaColor=(*TABLE_RGB, 1))
    client.createMultiBody(0, -1, table, (0, 0, -0.01))
    disc = client.createVisualShape(client.GEOM_CYLINDER, radius=GOAL_RADIUS, length=0.001, rgbaColor=(*GOAL_RGB, 1))
    client.createMultiBody(0, -1, disc, (0, 0, 0.001))
    pixels, _ = _camera(client, size, (0, 0, size, size))
    client.disconnect()
    return pixels, _averaged(pixels)


def _averaged(pixels):
    """RGB (h, w, 3) uint8 of RGBA (SUPERSAMPLE h, SUPERSAMPLE w) as uint32."""
    return np.asarray(Image.frombuffer("RGBX", pixels.shape[::-1], pixels).reduce(SUPERSAMPLE).convert("RGB"))


_VIEW = pybullet.computeViewMatrixFromYawPitchRoll(CAMERA_TARGET, CAMERA_DISTANCE, 90, CAMERA_ELEVATION, 0, 2)
_SLOPE = math.tan(math.radians(CAMERA_FOV) / 2)  # of the picture's edges


def _camera(client, size, window):
    """The part of a picture of (size, size) within a window (left, top, right, bottom), in pixels.

    Returns RGBA (h, w) as uint32 and the mask (h, w) of the pixels that show a body.
    """
    halves = (0.5, -0.5, 0.5, -0.5)  # TinyRenderer looks through the lower left corner of a pixel: now through its middle
    left, top, right, bottom = ((2 * (edge + half) / size - 1) * _SLOPE * NEAR for edge, half in zip(window, halves))
    projection = client.computeProjectionMatrix(left, right, -bottom, -top, NEAR, FAR)
    width, height = window[2] - window[0], window[3] - window[1]
    _, _, rgba, _, segmentation = client.getCameraImage(
        width, height, _VIEW, projection, lightDirection=LIGHT, shadow=0, renderer=client.ER_TINY_RENDERER)
    pixels = np.frombuffer(bytes(rgba), np.uint32)  # bytes() is quick for the tuples of pybullet-arm64, too
    return pixels.reshape(height, width), np.asarray(segmentation).reshape(height, width) >= 0


def _window(points, size):
    """The window (left, top, right, bottom) that shows points (N, 3), within a picture of (size, size)."""
    x, y, z, _ = np.reshape(_VIEW, (4, 4)).T @ np.append(points, np.ones((len(points), 1)), 1).T
    if (z > -NEAR).any():  # beside or behind the camera
        return 0, 0, size, size
    at = size / 2 * (1 + np.stack([x, -y]) / -z / _SLOPE)
    low, high = np.clip([np.floor(at.min(1)) - 1, np.ceil(at.max(1)) + 1], 0, size).astype(int).tolist()
    return *low, *high


Box = collections.namedtuple("Box", "low high shape dtype")  # what Gymnasium's says of an array


class PushEnv:
    """The pushing task, with the calls of a Gymnasium environment and what they promise.

    An observation is a dict of `state` (20,) float32 and, with the render_mode "rgb_array", `image`
    (image_size, image_size, 3) uint8, both of the same instant. The reward is 1.0 while the target
    is within SUCCESS_DISTANCE of the goal. `info` has `distance` (of the target from the goal),
    `distractor_displacement`, `success`, and `lost`: an object is wholly below or off the table. An episode's
    course depends on the task, the seed and the actions only: every reset starts a fresh physics client.
    Raises RuntimeError where an episode is needed and none is running, TypeError if a running one is to be copied.

    For Gymnasium itself:

        class Pushing(gymnasium.Env):
            metadata, render_mode = PushEnv.metadata, "rgb_array"
            def __init__(self, task):
                self.env, box = PushEnv(), lambda b: gymnasium.spaces.Box(b.low, b.high, b.shape, b.dtype)
                self.action_space, spaces = box(self.env.action_space), self.env.observation_space
                self.observation_space = gymnasium.spaces.Dict({name: box(space) for name, space in spaces.items()})
                self.task, self.step, self.render, self.close = task, self.env.step, self.env.render, self.env.close
            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                return self.env.reset(seed=seed, options={"task": self.task, **(options or {})})
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}
    action_space = Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def __init__(self, image_size=IMAGE_SIZE, render_mode="rgb_array"):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode is "rgb_array" or None, not {render_mode!r}')
        if operator.index(image_size) < 1:
            raise ValueError(f"image_size is 1 or more, not {image_size}")
        self.image_size, self.render_mode = image_size, render_mode
        self._client = self._rng = None

    @property
    def observation_space(self):
        """A dict of a Box for every entry of an observation."""
        spaces = {"state": Box(-np.inf, np.inf, (STATE_DIM,), np.float32)}
        return spaces | ({"image": Box(0, 255, (self.image_size, self.image_size, 3), np.uint8)} if self.render_mode else {})

    @property
    def client(self):
        """The physics client of the running episode."""
        if self._client is None:
            raise RuntimeError("no episode is running: call reset first")
        return self._client

    def __getstate__(self):
        if self._client is not None:
            raise TypeError("the physics of a running PushEnv cannot be copied or pickled: close it, or make another")
        return self.__dict__

    def reset(self, *, seed=None, options=None):
        """Start an episode; `options` holds the `task` and, if wanted, the target's `side` (1 or -1).

        With the option `swap` the distractor is placed first, the target second: the tasks of a pair,
        one of them swapped, start from the same scene for the same seed. Without a seed the generator of the
        last one goes on. Returns (obs, info). Raises ValueError without a task, for other options, and for
        bodies that do not fit.
        """
        options = {"side": None, "swap": False, **(options or {})}
        if options.keys() != {"task", "side", "swap"} or not isinstance(options["task"], Task) or \
                options["side"] not in (None, 1, -1) or options["swap"] not in (False, True):
            raise ValueError('reset needs options={"task": make_task(split, index)}, and takes a "side" of 1 or -1 and a '
                             f'"swap" of True or False, not {options}')
        self.close()
        self.task = options["task"]
        if seed is not None or self._rng is None:
            self._rng = np.random.default_rng(seed)
        self._client, self._boxes = _Client(), {}  # the corners, in its own frame, of what is drawn, by (body, link)
        try:
            with _decimal_points():
                self._build(options["side"], options["swap"])
        except BaseException:
            self.close()
            raise
        self.steps = self.steps_at_goal = 0
        self._distractor_start = self.distractor_position
        return self._observe(), self._info()

    def _build(self, side, swap):
        client = self.client
        client.setGravity(0, 0, -9.81)
        client.setTimeStep(1 / CONTROL_HZ / SUBSTEPS)
        # File caching would keep every file's bytes for ever; Bullet's 50 iterations move an object by less than 1 mm more.
        client.setPhysicsEngineParameter(enableFileCaching=0, numSolverIterations=10)
        unseen = client.createVisualShape(client.GEOM_BOX, halfExtents=(0.01,) * 3, visualFramePosition=(0, 0, -99))
        table = client.createMultiBody(0, client.createCollisionShape(client.GEOM_PLANE), unseen)
        client.changeDynamics(table, -1, lateralFriction=1)
        self._place_objects(side, swap)
        self._load_arm()

    def step(self, action):
        """Apply an action (7,) in [-1, 1], clipped, for one control step (1/20 s).

        Returns (obs, reward, terminated, truncated, info). Raises ValueError for a wrong shape or NaN, RuntimeError
        after the end of an episode.
        """
        client = self.client
        if self.steps >= HORIZON:
            raise RuntimeError(f"the episode has ended after {HORIZON} steps: call reset")
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {ACTION_DIM} finite numbers, not {action}")
        gravity = client.calculateInverseDynamics(self.arm, self.q.tolist(), [0] * 7, [0] * 7)
        torques = (np.clip(action, -1, 1) * TORQUE + gravity).tolist()
        apply = functools.partial(client.setJointMotorControlArray, self.arm, list(range(7)), client.TORQUE_CONTROL,
                                  forces=torques)
        mass, root = np.array(client.calculateMassMatrix(self.arm, self.q.tolist())), np.sqrt(DAMPING)
        damping_step = np.linalg.eigvalsh(root[:, None] * np.linalg.inv(mass) * root)[-1] / CONTROL_HZ / SUBSTEPS
        substeps = SUBSTEPS * math.ceil(damping_step / MAX_DAMPING_STEP)  # more in some stretched poses
        client.setTimeStep(1 / CONTROL_HZ / substeps)
        advance = client.stepSimulation
        for _ in range(substeps):  # PyBullet clears the torques at every step
            apply()
            advance()
        self.steps += 1
        obs, info = self._observe(), self._info()
        at_goal = info["distance"] < SUCCESS_DISTANCE
        self.steps_at_goal += at_goal
        info["success"] = self.steps_at_goal >= SUCCESS_STEPS
        return obs, float(at_goal), False, self.steps >= HORIZON, info

    def close(self):
        """End the physics client; the environment can be reset again."""
        if self._client is not None:
            with contextlib.suppress(pybullet.error):  # another part of the process may have ended it
                self._client.disconnect()
            self._client = None

    def render(self):
        """The scene as it is now, (image_size, image_size, 3) uint8."""
        return self.picture(self.image_size)

    @property
    def target_position(self):
        """(3,) position of the target's centre."""
        return np.array(self.client.getBasePositionAndOrientation(self.target)[0])

    @property
    def distractor_position(self):
        """(3,) position of the distractor's centre."""
        return np.array(self.client.getBasePositionAndOrientation(self.distractor)[0])

    def _place_objects(self, side, swap):
        bodies = [self.task.target, self.task.distractor]
        first_side = side * (1 - 2 * swap) if side else self._rng.choice((-1, 1))
        if swap:
            bodies.reverse()
        clearance = max(OBJECT_CLEARANCE, sum(body_shape(body)[2] for body in bodies))
        if clearance > MAX_CLEARANCE:
            raise ValueError(f"the bodies need {clearance:.2f} m between them, there are {MAX_CLEARANCE}: take smaller ones")
        places = []
        while len(places) < 2:  # the second body on the other side
            sign = first_side * (-1) ** len(places)
            place = np.array([self._rng.uniform(*START_X), sign * self._rng.uniform(*START_Y)])
            if np.linalg.norm(place) > GOAL_CLEARANCE:
                places.append(place)
            if len(places) == 2 and np.linalg.norm(places[0] - places[1]) <= clearance:
                places.clear()
        turns = [self.client.getQuaternionFromEuler((0, 0, self._rng.uniform(-np.pi, np.pi))) for _ in bodies]
        ids = [self._load_body(body, place, turn) for body, place, turn in zip(bodies, places, turns)]
        self.target, self.distractor = reversed(ids) if swap else ids
        for _ in range(SUBSTEPS * CONTROL_HZ // 2):  # half a second to come to rest, then back to the place
            self.client.stepSimulation()
        for body, place in zip(ids, places):
            (_, _, z), turn = self.client.getBasePositionAndOrientation(body)
            self.client.resetBasePositionAndOrientation(body, (*place, z), turn)
            self.client.resetBaseVelocity(body, (0, 0, 0), (0, 0, 0))

    def _load_body(self, body, place, turn):
        client = self.client
        scale, centre, _, vertices = _shape(body.mesh_id, body.size)
        collision = client.createCollisionShape(client.GEOM_MESH, fileName=_mesh(body.mesh_id)[0], meshScale=scale.tolist(),
                                                collisionFramePosition=(-centre * scale).tolist())
        half = np.ptp(vertices, axis=0) / 2
        files = {}
        if self.render_mode:
            png = io.BytesIO()
            _texture(body.appearance).save(png, "png")
            files = {"body.obj": _textured(body.mesh_id, body.size), "texture.png": png.getvalue()}
        with _temporary_folder(files) as folder:  # lists in place of the mesh's file would leak in PyBullet
            visual = client.createVisualShape(client.GEOM_MESH, fileName=f"{folder}/body.obj") if files else -1
            body_id = client.createMultiBody(body.mass, collision, visual, (*place, half[2] + 0.001), turn)  # reads it again
            if files:
                client.changeVisualShape(body_id, -1, textureUniqueId=client.loadTexture(f"{folder}/texture.png"),
                                         rgbaColor=(1,) * 4)
        client.changeDynamics(body_id, -1, lateralFriction=body.friction, rollingFriction=0.002,
                              spinningFriction=0.002)
        self._boxes[body_id, -1] = _corners(-half, half)
        return body_id

    def _load_arm(self):
        client = self.client
        files, corners = _arm()
        with _temporary_folder(files) as folder:
            # Inertias recomputed from the fork's thin boxes would let the last joint spin freely.
            self.arm = client.loadURDF(f"{folder}/arm.urdf", BASE, useFixedBase=True, flags=client.URDF_USE_INERTIA_FROM_FILE)
        self._boxes |= {(self.arm, link): box for link, box in corners.items()}
        client.setJointMotorControlArray(self.arm, range(7), client.VELOCITY_CONTROL, forces=[0] * 7)
        speeds = self._rng.uniform(-START_SPEED, START_SPEED, 7)
        for joint in range(7):
            client.changeDynamics(self.arm, joint, jointDamping=DAMPING[joint])
            client.resetJointState(self.arm, joint, START_JOINTS[joint], speeds[joint])
        client.changeDynamics(self.arm, FORK_LINK, lateralFriction=0.5, maxJointVelocity=MAX_SPEED)  # of all joints

    def _observe(self):
        client = self.client
        joints = client.getJointStates(self.arm, range(7))
        self.q, self.dq = (np.array([joint[i] for joint in joints]) for i in (0, 1))
        fork = client.getLinkState(self.arm, FORK_LINK, computeLinkVelocity=True, computeForwardKinematics=True)
        self.fork_velocity = np.array(fork[6][:2])
        self.fork_position, self.fork_rotation = np.array(fork[4]), np.reshape(
            client.getMatrixFromQuaternion(fork[5]), (3, 3))
        obs = {"state": np.concatenate([self.q, self.dq, self.fork_position, np.zeros(3)]).astype(np.float32)}
        if self.render_mode:
            obs["image"] = self.render()
        return obs

    def picture(self, image_size):
        """The scene as it is now, (image_size, image_size, 3) uint8, antialiased.

        The bodies are drawn over the empty scene: the same picture as drawing it all, but faster. Raises ValueError
        without a render_mode: the bodies were not given their looks.
        """
        if not self.render_mode or image_size < 1:
            raise ValueError(f'pictures need PushEnv(render_mode="rgb_array") and a size of 1 or more, not {image_size}')
        size = image_size * SUPERSAMPLE
        empty, picture = _background(size)
        picture, (left, top, right, bottom) = picture.copy(), _window(self._corners(), image_size)
        if left < right and top < bottom:
            window = [SUPERSAMPLE * edge for edge in (left, top, right, bottom)]
            pixels, body = _camera(self.client, size, window)
            pixels = np.where(body, pixels, empty[window[1]:window[3], window[0]:window[2]])
            picture[top:bottom, left:right] = _averaged(pixels)
        return picture

    def _corners(self):
        """Points (N, 3) around all that is drawn."""
        client, corners = self.client, []
        for (body, link), box in self._boxes.items():
            if link < 0:
                position, turn = client.getBasePositionAndOrientation(body)
            else:
                position, turn = client.getLinkState(body, link, computeForwardKinematics=True)[4:6]
            corners.append(box @ np.reshape(client.getMatrixFromQuaternion(turn), (3, 3)).T + position)
        return np.concatenate(corners)

    def _info(self):
        target, distractor = self.target_position, self.distractor_position
        lost = any(np.abs(place[:2]).max() > TABLE_EDGE or self.client.getAABB(body)[1][2] < 0
                   for body, place in ((self.target, target), (self.distractor, distractor)))
        return {"distance": float(np.linalg.norm(target[:2])), "lost": lost,
                "distractor_displacement": float(np.linalg.norm((distractor - self._distractor_start)[:2])),
                "success": self.steps_at_goal >= SUCCESS_STEPS}


# The scripted expert. Every phase can be read from the picture and the state, so that it can be cloned.
TRAVEL_HEIGHT, PUSH_HEIGHT = 0.118, 0.022  # of the fork
TRAVEL_SPEED, PUSH_SPEED = 0.45, 0.20  # m/s
STOP_DISTANCE = 0.015  # of the target from the goal
PUSH_FORCE, PUSH_GAIN, MAX_FORCE = 4.0, 50.0, 14.0  # N, N s/m, N: the force grows with how far the push lags behind
DETOUR, DETOUR_WIDTH, DETOUR_MARGIN = 0.6, 0.05, 0.02  # sideways per metre ahead, at most; over 5 cm; m of air kept
JOINT_GAIN = 14.0  # 1/s, of the joint velocities' error
POSTURE = np.array([0, 1.4, 0, -1.5, 0, 0, 0])  # what the arm's spare degree of freedom tends to


def expert_action(env):
    """The expert's action (7,) in [-1, 1] for the state that `env` is in; it sees the bodies' poses.

    High up it travels to a point behind the target on the line to the goal and turns the fork
    there, comes down in a funnel, and pushes while it is low and has the target in the fork;
    otherwise it goes up and comes again. The line bends away from a distractor beside it.
    """
    target, fork, rotation = env.target_position[:2], env.fork_position, env.fork_rotation
    distance = np.linalg.norm(target)
    ahead = _push_direction(env, target, distance)
    aside = np.array([-ahead[1], ahead[0]])
    gap = _extent(env, env.target, -ahead) + PRONG + 0.02
    behind = target - ahead * gap
    along, lateral = (fork[:2] - target) @ ahead, (fork[:2] - target) @ aside
    facing = -rotation[:2, 0]
    yaw_error = np.arctan2(facing[0] * ahead[1] - facing[1] * ahead[0], facing @ ahead)
    force = np.zeros(2)
    if distance < STOP_DISTANCE:
        velocity, height, yaw_error = np.zeros(2), fork[2], 0.0
    elif fork[2] < 0.05 and -gap - 0.04 < along < 0 and abs(lateral) < 0.05 and abs(yaw_error) < 0.6:
        speed, height = min(PUSH_SPEED, 2 * distance + 0.02), PUSH_HEIGHT
        velocity = ahead * speed - 4 * lateral * aside
        force = ahead * np.clip(PUSH_FORCE + PUSH_GAIN * (speed - env.fork_velocity @ ahead), 0, MAX_FORCE)
    else:
        offset = behind - fork[:2]
        away = np.linalg.norm(offset)
        height = PUSH_HEIGHT + 2 * (away - 0.015) + 0.1 * max(0, abs(yaw_error) - 0.2)
        height = np.clip(height, PUSH_HEIGHT, TRAVEL_HEIGHT)
        speed = min(TRAVEL_SPEED, 4 * away) * np.clip(1 - (height - fork[2] - 0.02) / 0.03, 0, 1)
        velocity = offset / max(away, 1e-6) * speed
    twist = np.concatenate([velocity, [np.clip(8 * (height - fork[2]), -0.35, 0.35)],
                            4 * np.cross(rotation[:, 2], (0, 0, -1))])
    twist[5] = np.clip(5 * yaw_error, -3, 3)
    return _joint_control(env, twist, force)


def _push_direction(env, target, distance):
    """The horizontal unit vector (2,) from the target to the goal, turned away from a distractor that is in the way."""
    ahead = -target / max(distance, 1e-6)
    aside = np.array([-ahead[1], ahead[0]])
    offset = env.distractor_position[:2] - target
    if not -0.12 < offset @ ahead < distance:
        return ahead
    aside *= np.copysign(1, offset @ aside)  # to the distractor's side
    width = max(FORK_WIDTH / 2, _extent(env, env.target, aside)) + _extent(env, env.distractor, -aside)
    missing = width + DETOUR_MARGIN - offset @ aside
    ahead = ahead - DETOUR * np.clip(missing / DETOUR_WIDTH, 0, 1) * aside
    return ahead / np.linalg.norm(ahead)


def _joint_control(env, twist, force):
    """Torques (as an action) for a fork velocity (6,) and a horizontal fork force (2,)."""
    q = env.q.tolist()
    jacobian = np.concatenate(env.client.calculateJacobian(env.arm, FORK_LINK, (0, 0, 0), q, [0] * 7, [0] * 7))
    inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 1e-3 * np.eye(6))
    posture = POSTURE - env.q
    speeds = inverse @ twist + (np.eye(7) - inverse @ jacobian) @ posture
    mass = np.array(env.client.calculateMassMatrix(env.arm, q))
    torque = DAMPING * speeds + mass @ (JOINT_GAIN * (speeds - env.dq)) + jacobian[:2].T @ force
    return np.clip(torque / TORQUE, -1, 1)


def _extent(env, body_id, direction):
    """How far an object reaches from its centre along a horizontal direction."""
    body = env.task.target if body_id == env.target else env.task.distractor
    _, turn = env.client.getBasePositionAndOrientation(body_id)
    rotation = np.reshape(env.client.getMatrixFromQuaternion(turn), (3, 3))
    return (_shape(body.mesh_id, body.size)[3] @ (np.append(direction, 0) @ rotation)).max()
