// The activations of the adapter's hidden units, on vectors: value(x), and gradient(x, dvalue).
// A part of path.inl.

inline Vec magnitude_of(Vec value) { return as_float(as_bits(value) & 0x7fffffff); }

// Comparisons are written so that a NaN stays one.
struct Relu {
  static Vec value(Vec x) { return x < 0.0f ? Vec{} : x; }
  static Vec gradient(Vec x, Vec dvalue) { return x <= 0.0f ? Vec{} : dvalue; }
};

// x Phi(x), with the normal distribution function itself, not its approximation by tanh.
struct Gelu {
  static Vec value(Vec x) { return x * distribution(x, bell(x)); }
  static Vec gradient(Vec x, Vec dvalue) {
    const Vec exponential = bell(x);
    return dvalue * (distribution(x, exponential) + x * exponential * 0.398942280f);
  }

 private:
  static Vec bell(Vec x) { return exp_nonpositive(x * x * -0.5f); }

  // Phi(-a) = exp(-a^2 / 2) q(u) with u = a / (1 + 0.32 a). The polynomial q was fitted on [0, 13.2], where the
  // exponential ends; Phi errs by less than 1e-7.
  static Vec distribution(Vec x, Vec exponential) {
    Vec a = magnitude_of(x);
    a = a > 14.0f ? Vec{} + 14.0f : a;  // an infinity would become NaN
    const Vec u = a / (1.0f + 0.32f * a);
    Vec q = Vec{} - 1.58414914e-5f;
    for (float coefficient :
         {8.47098563e-5f, 2.57642649e-4f, -1.42271328e-3f, -1.38328215e-2f, 0.122337632f, -0.398942143f, 0.5f}) {
      q = q * u + coefficient;
    }
    const Vec tail = exponential * q;
    return x < 0.0f ? tail : 1.0f - tail;
  }
};

struct Silu {
  static Vec value(Vec x) {
    const Vec e = exp_nonpositive(-magnitude_of(x));
    return x * (x < 0.0f ? e : Vec{} + 1.0f) / (1.0f + e);
  }
  static Vec gradient(Vec x, Vec dvalue) {
    const Vec e = exp_nonpositive(-magnitude_of(x)), one = Vec{} + 1.0f, inverse = 1.0f / (1.0f + e);
    const Vec sigmoid = (x < 0.0f ? e : one) * inverse, rest = (x < 0.0f ? one : e) * inverse;
    return dvalue * sigmoid * (1.0f + x * rest);
  }
};

// function(Relu{}) or that of another activation.
template <class Function>
inline void with_activation(AdapterActivation activation, const Function& function) {
  switch (activation) {
    case AdapterActivation::relu:
      return function(Relu{});
    case AdapterActivation::gelu:
      return function(Gelu{});
    case AdapterActivation::silu:
      return function(Silu{});
  }
}
