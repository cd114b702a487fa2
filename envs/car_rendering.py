"""CarRacing drawn only when it is looked at, and then with less work for the very same picture.

Gymnasium's CarRacing draws 1000x800 pixels at every step and scales them to 96x96; its physics takes a hundredth of
that time. Here a step draws nothing, and `Renderer` draws the picture of a moment when somebody asks for it:
- the corners of all polygons are projected by numpy at once, and only those that reach the picture are drawn;
- a background that fills the picture is a fill, not a polygon;
- the world is not drawn where the indicators will cover it, is turned upside down only after it has become narrow,
  and the surfaces, the track's corners and the score's letters are kept.
What stays is what decides the pixels: the same fill routines in the same order, on coordinates rounded the same way.

Shapes: P polygons of 4 corners, x and y. Screen coordinates are pixels, y upwards: the finished picture is upside down.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pygame
from gymnasium.envs.box2d import car_racing as original
from pygame import gfxdraw

WIDTH, HEIGHT = original.WINDOW_W, original.WINDOW_H  # pixels, as drawn
SIDE = original.STATE_W  # pixels, as seen: a square
PANEL = HEIGHT // 8  # pixels at the bottom that the indicators cover
CAR = (WIDTH / 2, HEIGHT / 4)  # where the car is on the screen
REACH = float(np.hypot(WIDTH / 2, HEIGHT - CAR[1])) + 8  # pixels from the car to the farthest corner, and a bit
MARGIN = 3  # pixels by which the soft edge of a polygon may pass its corners, and one for luck
FASTEST = 380.0  # of a wheel, radians a second: at 400, or with the car at 200 units a second, a bar leaves the panel

Colour = tuple[int, ...]


def _grass() -> np.ndarray:
    """The light squares of the playing field, (400, 4, 2) in the game's units, in the game's order."""
    at = original.GRASS_DIM * np.arange(-20, 20, 2)
    low = np.stack(np.meshgrid(at, at, indexing="ij"), -1).reshape(-1, 1, 2)
    # Every corner as the game computes it: GRASS_DIM * x + GRASS_DIM, or + 0.
    return low + original.GRASS_DIM * np.array([(1, 0), (0, 0), (0, 1), (1, 1)])


GRASS = _grass()
FIELD = original.PLAYFIELD * np.array([[(1, 1), (1, -1), (-1, -1), (-1, 1)]], float)  # (1, 4, 2)


class UnrenderedCarRacing(original.CarRacing):
    """Gymnasium's CarRacing whose reset and step give None instead of the picture; see `Renderer`."""

    corners: np.ndarray  # (P, 4, 2) float64, the grass and then the road, in the order of drawing
    shown: float = 0.0  # the score in the picture, which is older than the step's reward

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As gymnasium's, without a picture."""
        answer = super().reset(seed=seed, options=options)
        self.corners = np.concatenate([GRASS, np.array([polygon for polygon, _ in self.road_poly], float)])
        return answer

    def rendered_by_gymnasium(self) -> np.ndarray:
        """Gymnasium's own drawing of this moment, (96, 96, 3) uint8: what `Renderer` has to match."""
        now, self.reward = self.reward, self.shown
        picture: np.ndarray = super()._render("state_pixels")
        self.reward = now
        return picture

    def _render(self, mode: str) -> Any:
        if mode != "state_pixels":
            return super()._render(mode)
        self.shown = self.reward  # the step goes on to change it; everything else in the picture stays
        return None


class _Camera(NamedTuple):
    """From the game's units to the screen: turn, zoom, move, in double precision and in this order."""

    cos: float
    sin: float
    zoom: float  # pixels a unit
    angle: float  # radians
    move: tuple[float, float]  # pixels

    @staticmethod
    def of(game: original.CarRacing) -> _Camera:
        assert game.car is not None, "reset() comes first"
        angle, here = -game.car.hull.angle, game.car.hull.position
        # The first second zooms in, from the whole playing field to the car.
        zoom = 0.1 * original.SCALE * max(1 - game.t, 0) + original.ZOOM * original.SCALE * min(game.t, 1)
        moved = pygame.math.Vector2((-here[0] * zoom, -here[1] * zoom)).rotate_rad(angle)
        # pygame's own sine and cosine: it treats right angles in its own way.
        cos, sin = pygame.math.Vector2(1, 0).rotate_rad(angle)
        return _Camera(cos, sin, zoom, angle, (CAR[0] + moved[0], CAR[1] + moved[1]))

    def project(self, corners: np.ndarray) -> np.ndarray:
        """Turns (..., 2) corners in the game's units into (..., 2) int64 pixels, rounded towards 0 as pygame does."""
        x, y = corners[..., 0], corners[..., 1]
        screen = np.empty(corners.shape, np.int64)
        screen[..., 0] = (self.cos * x - self.sin * y) * self.zoom + self.move[0]
        screen[..., 1] = (self.sin * x + self.cos * y) * self.zoom + self.move[1]
        return screen


class Renderer:
    """Draws any number of games one after the other; not for two threads at once."""

    def __init__(self) -> None:
        # Of their own depth, whatever window the process may have open.
        self._world = pygame.Surface((WIDTH, HEIGHT), depth=32)  # upside down
        self._panel = pygame.Surface((WIDTH, HEIGHT), depth=32)  # upright; the part under the world stays unused
        self._upside_down = pygame.Surface((SIDE, HEIGHT - PANEL), depth=32)
        self._narrow = pygame.Surface((SIDE, HEIGHT), depth=32)
        self._picture = pygame.Surface((SIDE, SIDE), depth=32)
        self._above = self._world.subsurface((0, PANEL, WIDTH, HEIGHT - PANEL))
        self._below = self._panel.subsurface((0, HEIGHT - PANEL, WIDTH, PANEL))
        self._narrow_below = self._narrow.subsurface((0, HEIGHT - PANEL, SIDE, PANEL))

    def render(self, game: UnrenderedCarRacing) -> np.ndarray:
        """Returns the game's observation of this moment, (96, 96, 3) uint8, equal to gymnasium's in every pixel."""
        car = game.car
        assert car is not None, "reset() comes first"
        if max(abs(wheel.omega) for wheel in car.wheels) > FASTEST or car.hull.linearVelocity.length > FASTEST / 2:
            return game.rendered_by_gymnasium()  # not within reach of the engine
        camera = _Camera.of(game)
        self._draw_field(game, camera)
        self._draw_shapes(game, camera)
        car.draw(self._world, camera.zoom, camera.move, camera.angle, draw_particles=False)
        self._draw_panel(game)
        return self._scaled()

    def _draw_field(self, game: UnrenderedCarRacing, camera: _Camera) -> None:
        x, y = game.car.hull.position  # type: ignore[union-attr]
        colour = _whole(game.bg_color)
        if max(abs(x), abs(y)) + REACH / camera.zoom < original.PLAYFIELD:
            self._above.fill(colour)
            return
        self._world.fill((0, 0, 0))
        self._draw(camera.project(FIELD)[0].tolist(), colour)

    def _draw_shapes(self, game: UnrenderedCarRacing, camera: _Camera) -> None:
        screen = camera.project(game.corners)  # (P, 4, 2)
        low, high = screen.min(1), screen.max(1)
        inside = (high[:, 0] >= -MARGIN) & (low[:, 0] < WIDTH + MARGIN)
        inside &= (high[:, 1] >= PANEL - MARGIN) & (low[:, 1] < HEIGHT + MARGIN)
        visible = np.flatnonzero(inside)
        grass, road = _whole(game.grass_color), game.road_poly
        for number, points in zip(visible.tolist(), screen[visible].tolist(), strict=True):
            # A tile that the car has touched has another colour than before, so colours are read anew.
            self._draw(points, grass if number < len(GRASS) else _whole(road[number - len(GRASS)][1]))

    def _draw(self, points: list[list[int]], colour: Colour) -> None:
        gfxdraw.aapolygon(self._world, points, colour)
        gfxdraw.filled_polygon(self._world, points, colour)

    def _draw_panel(self, game: UnrenderedCarRacing) -> None:
        game.surf = self._panel  # type: ignore[assignment]  # where gymnasium's own method draws
        game._render_indicators(WIDTH, HEIGHT)
        text = _letters(f"{game.shown:04.0f}")
        place = text.get_rect()
        place.center = (60, HEIGHT - HEIGHT // 16)
        self._panel.blit(text, place)

    def _scaled(self) -> np.ndarray:
        """Smooth scaling goes over the columns and then over the rows, so that rows can be put together in between."""
        scale = pygame.transform.smoothscale
        scale(self._above, self._upside_down.get_size(), self._upside_down)
        self._narrow.blit(pygame.transform.flip(self._upside_down, False, True), (0, 0))
        scale(self._below, self._narrow_below.get_size(), self._narrow_below)
        scale(self._narrow, (SIDE, SIDE), self._picture)
        return np.ascontiguousarray(pygame.surfarray.pixels3d(self._picture).transpose(1, 0, 2))


def _whole(colour: Any) -> Colour:
    return tuple([int(part) for part in colour])


@lru_cache(maxsize=256)
def _letters(text: str) -> pygame.Surface:
    pygame.font.init()  # may have been ended by a window that was closed
    font = pygame.font.Font(pygame.font.get_default_font(), 42)
    return font.render(text, True, (255, 255, 255), (0, 0, 0))
