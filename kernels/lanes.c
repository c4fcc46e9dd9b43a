#include "lanes.h"

/* Four rows by two columns: eight sums stay in registers, and six loads serve eight multiplications. */
static void tile(int64_t k, ls_entries a, ls_entries b, int add, ls_entries c)
{
    ls_lanes s00 = {0}, s01 = {0}, s10 = {0}, s11 = {0}, s20 = {0}, s21 = {0}, s30 = {0}, s31 = {0};
    const ls_lanes *x = a.p, *y = b.p;
    for (int64_t i = 0; i < k; i++, x += a.col, y += b.row) {
        const ls_lanes y0 = y[0], y1 = y[b.col];
        ls_lanes xr = x[0];
        s00 += xr * y0, s01 += xr * y1;
        xr = x[a.row];
        s10 += xr * y0, s11 += xr * y1;
        xr = x[2 * a.row];
        s20 += xr * y0, s21 += xr * y1;
        xr = x[3 * a.row];
        s30 += xr * y0, s31 += xr * y1;
    }
    ls_lanes *to0 = c.p, *to1 = to0 + c.row, *to2 = to1 + c.row, *to3 = to2 + c.row;
    if (add) {
        s00 += to0[0], s01 += to0[c.col], s10 += to1[0], s11 += to1[c.col];
        s20 += to2[0], s21 += to2[c.col], s30 += to3[0], s31 += to3[c.col];
    }
    to0[0] = s00, to0[c.col] = s01, to1[0] = s10, to1[c.col] = s11;
    to2[0] = s20, to2[c.col] = s21, to3[0] = s30, to3[c.col] = s31;
}

static void one(int64_t k, ls_entries a, ls_entries b, int add, ls_lanes *c)
{
    ls_lanes s = {0};
    for (int64_t i = 0; i < k; i++) s += a.p[i * a.col] * b.p[i * b.row];
    if (add) s += *c;
    *c = s;
}

void ls_lanes_product(int64_t m, int64_t n, int64_t k, ls_entries a, ls_entries b, int add, ls_entries c)
{
    const int64_t rows = m - m % 4, cols = n - n % 2;
    for (int64_t i = 0; i < m; i += i < rows ? 4 : 1)
        for (int64_t j = 0; j < n; j += i < rows && j < cols ? 2 : 1) {
            const ls_entries row = {a.p + i * a.row, a.row, a.col}, col = {b.p + j * b.col, b.row, b.col};
            const ls_entries to = {c.p + i * c.row + j * c.col, c.row, c.col};
            if (i < rows && j < cols)
                tile(k, row, col, add, to);
            else
                for (int64_t r = 0; r < (i < rows ? 4 : 1); r++)
                    one(k, (ls_entries){row.p + r * a.row, a.row, a.col}, col, add, to.p + r * c.row);
        }
}
